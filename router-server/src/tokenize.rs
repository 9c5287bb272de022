//! `POST /tokenize` and `POST /detokenize`, with the shapes of vLLM: what a prompt costs, and what ids read.
//!
//! The work is the pool's encoders', as for a prompt that is generated from; here is what a body may say.

use std::sync::Arc;

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::body::read;
use crate::error::Error;
use crate::fields::Fields;
use crate::http::App;
use crate::prompt::Prompt;

/// Fields of `/tokenize`. What is in no list is refused by name; what is not served has a value that asks for nothing.
pub(crate) const TOKENIZE: [&str; 9] = [
    "model",
    "prompt",
    "messages",
    "tools",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "return_token_strs",
];
/// Fields of `/detokenize`.
pub(crate) const DETOKENIZE: [&str; 2] = ["model", "tokens"];

/// A body: what is ids or text apart, because a list of a million ids as JSON values would take many times its size.
struct Body {
    prompt: Option<Prompt>,
    fields: Fields,
    /// The first field that is in no list and not null.
    unknown: Option<String>,
}

/// Reads a [`Body`] whose `prompt` is named so, and whose fields are these.
struct Shape {
    prompt: &'static str,
    known: &'static [&'static str],
}

impl Shape {
    fn read(self, bytes: &[u8]) -> Result<Body, Error> {
        let mut reader = serde_json::Deserializer::from_slice(bytes);
        let body = self.deserialize(&mut reader).and_then(|body| reader.end().map(|()| body));
        body.map_err(|error| Error::bad_request(format!("the body is not a JSON object: {error}")))
    }
}

impl<'de> DeserializeSeed<'de> for Shape {
    type Value = Body;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Body, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Shape {
    type Value = Body;
    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
        let mut body = Body { prompt: None, fields: Fields(Map::new()), unknown: None };
        while let Some(key) = map.next_key::<String>()? {
            if key == self.prompt {
                body.prompt = Some(map.next_value()?).filter(|prompt| *prompt != Prompt::Other("null"));
            } else if self.known.contains(&key.as_str()) {
                body.fields.0.insert(key, map.next_value()?);
            } else if map.next_value::<Option<IgnoredAny>>()?.is_some() && body.unknown.is_none() {
                body.unknown = Some(key.chars().take(64).collect());
            }
        }
        Ok(body)
    }
}

impl Body {
    /// Refuses what is left over.
    fn nothing_else(self) -> Result<(), Error> {
        let left = self.fields.0.into_iter().find(|(_, value)| !value.is_null());
        self.unknown.or(left.map(|(name, _)| name)).map_or(Ok(()), |name| Err(Error::unsupported(name)))
    }
}

/// What `/tokenize` is asked.
#[derive(Debug, PartialEq)]
struct Tokenize {
    model: String,
    text: Text,
    strings: bool,
}

#[derive(Debug, PartialEq)]
enum Text {
    Prompt(String),
    Chat { messages: Vec<Value>, tools: Option<Value> },
}

impl Tokenize {
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut body = Shape { prompt: "prompt", known: &TOKENIZE }.read(bytes)?;
        let fields = &mut body.fields;
        let model = fields.model()?;
        let strings = fields.flag("return_token_strs")?;
        let text = match (body.prompt.take(), fields.messages()?) {
            (None, None) => return Err(Error::invalid("prompt", "the prompt is missing: send prompt or messages")),
            (Some(_), Some(_)) => return Err(Error::invalid("messages", "send prompt or messages, not both")),
            (Some(Prompt::Text(text)), None) => Text::Prompt(text),
            (Some(_), None) => return Err(Error::invalid("prompt", "the prompt must be a string")),
            (None, Some(messages)) => Text::Chat { messages, tools: fields.tools()? },
        };
        // Special tokens stand where a chat's template puts them, and at a prompt's beginning: as when it is served.
        let special = json!(matches!(text, Text::Prompt(_)));
        let as_served = [
            ("add_special_tokens", special),
            ("add_generation_prompt", json!(true)),
            ("continue_final_message", json!(false)),
            ("chat_template_kwargs", json!({})),
        ];
        for (name, value) in as_served {
            if fields.take(name).is_some_and(|given| given != value) {
                return Err(Error::unsupported(name));
            }
        }
        body.nothing_else()?;
        Ok(Self { model, text, strings })
    }
}

/// `POST /tokenize`: the ids that a prompt or a conversation becomes when it is served.
pub async fn tokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: HttpBody) -> Result<Json<Value>, Error> {
    let body = read(&headers, body, app.most_payload).await?;
    let _busy = app.begin()?;
    let Tokenize { model, text, strings } = Tokenize::parse(&body)?;
    let pool = app.fleet.pool(&model)?;
    let ids = match text {
        // Nothing to encode is no error here: its count is what is asked.
        Text::Prompt(text) => pool.encode(text).await?,
        Text::Chat { messages, tools } => pool.encode_chat(messages, tools, body.len()).await?.0,
    };
    let strings = if strings { json!(pool.token_strings(ids.clone()).await?) } else { Value::Null };
    let most = pool.most_tokens().0;
    Ok(Json(json!({"count": ids.len(), "max_model_len": most, "tokens": ids, "token_strs": strings})))
}

/// `POST /detokenize`: what ids read, special tokens written out.
pub async fn detokenize(State(app): State<Arc<App>>, headers: HeaderMap, body: HttpBody) -> Result<Json<Value>, Error> {
    let body = read(&headers, body, app.most_payload).await?;
    let _busy = app.begin()?;
    let (model, ids) = parse_ids(&body)?;
    let text = app.fleet.pool(&model)?.decode(ids).await?;
    Ok(Json(json!({"prompt": text})))
}

fn parse_ids(bytes: &[u8]) -> Result<(String, Vec<u32>), Error> {
    let mut body = Shape { prompt: "tokens", known: &DETOKENIZE }.read(bytes)?;
    let model = body.fields.model()?;
    let ids = match body.prompt.take() {
        Some(Prompt::Ids(ids)) => ids,
        None => return Err(Error::invalid("tokens", "the tokens are missing")),
        Some(_) => return Err(Error::invalid("tokens", "the tokens must be a list of token ids")),
    };
    body.nothing_else()?;
    Ok((model, ids))
}

/// What of a body is right, without an app to ask.
#[cfg(test)]
pub(crate) fn check_tokenize(bytes: &[u8]) -> Result<(), Error> {
    Tokenize::parse(bytes).map(drop)
}

/// Likewise.
#[cfg(test)]
pub(crate) fn check_detokenize(bytes: &[u8]) -> Result<(), Error> {
    parse_ids(bytes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(error: &Error) -> Value {
        error.body()["error"]["param"].clone()
    }

    #[test]
    fn a_prompt_or_a_conversation() {
        let prompt =
            Tokenize::parse(br#"{"model": "m", "prompt": "hi", "add_special_tokens": true}"#).expect("a prompt");
        assert_eq!(prompt.text, Text::Prompt("hi".into()));
        let chat = br#"{"model": "m", "messages": [{"role": "user", "content": "hi"}], "add_special_tokens": false,
                        "tools": [], "add_generation_prompt": true, "return_token_strs": true}"#;
        let chat = Tokenize::parse(chat).expect("a conversation");
        assert!(chat.strings && matches!(chat.text, Text::Chat { tools: None, .. }));
        assert_eq!(parse_ids(br#"{"model": "m", "tokens": [5, 6]}"#).expect("ids"), ("m".into(), vec![5, 6]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let messages = r#""messages": [{"role": "user", "content": "hi"}]"#;
        let table = [
            (String::new(), "prompt"),
            (r#""prompt": null"#.to_owned(), "prompt"),
            (r#""prompt": [5]"#.to_owned(), "prompt"),
            (format!(r#""prompt": "a", {messages}"#), "messages"),
            (r#""messages": []"#.to_owned(), "messages"),
            (r#""messages": "hi""#.to_owned(), "messages"),
            (r#""messages": [{"role": "pirate"}]"#.to_owned(), "messages"),
            (format!(r#"{messages}, "tools": [{{"type": "browser"}}]"#), "tools"),
            (format!(r#"{messages}, "add_generation_prompt": false"#), "add_generation_prompt"),
            (format!(r#"{messages}, "add_special_tokens": true"#), "add_special_tokens"),
            (r#""prompt": "a", "add_special_tokens": false"#.to_owned(), "add_special_tokens"),
            (r#""prompt": "a", "tools": [1]"#.to_owned(), "tools"),
            (r#""prompt": "a", "temperature": 1"#.to_owned(), "temperature"),
        ];
        for (extra, field) in table {
            let comma = if extra.is_empty() { "" } else { "," };
            let body = format!(r#"{{"model": "m"{comma} {extra}}}"#);
            let error = Tokenize::parse(body.as_bytes()).expect_err(&body);
            assert_eq!((error.status().as_u16(), param(&error)), (400, json!(field)), "{body}: {error}");
        }
        for (body, field) in [
            (r#"{"tokens": [5]}"#, json!("model")),
            (r#"{"model": "m"}"#, json!("tokens")),
            (r#"{"model": "m", "tokens": "5"}"#, json!("tokens")),
            (r#"{"model": "m", "tokens": [-5]}"#, json!("tokens")),
            (r#"{"model": "m", "tokens": [5], "prompt": "a"}"#, json!("prompt")),
            (r#"{"model": "m", "tokens": [5]} 6"#, Value::Null),
        ] {
            let error = parse_ids(body.as_bytes()).expect_err(body);
            assert_eq!((error.status().as_u16(), param(&error)), (400, field), "{body}: {error}");
        }
    }
}
