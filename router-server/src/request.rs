//! OpenAI's requests: what is read of a body.
//!
//! Every field is either served, or neutral, or refused by name: nothing that would change the answer is passed over
//! in silence. Knows JSON and values' ranges; does not know models.

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::fields::{Fields, is_known};
use crate::json::Parsed;
use crate::messages::{check_messages, check_tools};
use crate::prompt::{MOST_PROMPTS, Prompt};
use crate::proto::Sampling;

/// The body of `POST /v1/completions`.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The model's name.
    pub model: String,
    /// Texts or ids: at least one, none of them empty.
    pub prompts: Vec<Prompt>,
    /// All else.
    pub params: Params,
}

/// The body of `POST /v1/chat/completions`.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// The model's name.
    pub model: String,
    /// The conversation, each message an object with a role, as a template reads it.
    pub messages: Vec<minijinja::Value>,
    /// Tool schemas for the template.
    pub tools: Option<minijinja::Value>,
    /// All else.
    pub params: Params,
}

/// Fields that both bodies have.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // they are the client's, and as they come
pub struct Params {
    /// Most output tokens, if the client says.
    pub max_tokens: Option<u32>,
    /// The field that said so, or would have.
    pub limit_name: &'static str,
    /// Tokens before which nothing ends the output.
    pub min_tokens: u32,
    /// Answers wanted.
    pub n: u32,
    /// How tokens are drawn; without the seed.
    pub sampling: Sampling,
    /// For the draws; the router draws one if the client does not say.
    pub seed: Option<u64>,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Ids that end the output.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the end-of-text token.
    pub ignore_eos: bool,
    /// Answer as server-sent events.
    pub stream: bool,
    /// With a last event that has the usage.
    pub include_usage: bool,
    /// Give the ids beside the text.
    pub return_token_ids: bool,
    /// A short time to the first token is worth a slice start of others.
    pub urgent: bool,
}

/// A body as it was parsed: what may be long apart, by parsers of their own. What is in a field that nobody knows is not kept: as
/// JSON values it could take many times its size.
struct Body {
    prompt: Option<Prompt>,
    messages: Option<Parsed>,
    tools: Option<Parsed>,
    /// The first field that is not known and not null.
    unknown: Option<String>,
    fields: Map<String, Value>,
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Body;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
                let mut body = Body { prompt: None, messages: None, tools: None, unknown: None, fields: Map::new() };
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "prompt" => body.prompt = Some(map.next_value()?),
                        "messages" => body.messages = map.next_value()?,
                        "tools" => body.tools = map.next_value()?,
                        name if is_known(name) => {
                            body.fields.insert(key, map.next_value()?);
                        }
                        name => {
                            if map.next_value::<Option<IgnoredAny>>()?.is_some() && body.unknown.is_none() {
                                body.unknown = Some(name.chars().take(64).collect());
                            }
                        }
                    }
                }
                Ok(body)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

fn parse(body: &[u8]) -> Result<Body, Error> {
    serde_json::from_slice(body).map_err(|error| Error::bad_request(format!("the body is not a JSON object: {error}")))
}

impl Completion {
    /// Reads and checks a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let body = parse(body)?;
        let mut fields = Fields(body.fields);
        let model = fields.model()?;
        let prompts = match body.prompt {
            None | Some(Prompt::Other("null")) => return Err(Error::invalid("prompt", "the prompt is missing")),
            Some(Prompt::Other(what)) => {
                return Err(Error::invalid(
                    "prompt",
                    format!("the prompt must be a string, a list of token ids, or a list of either: {what}"),
                ));
            }
            Some(Prompt::Several(prompts)) => prompts,
            Some(prompt) => vec![prompt],
        };
        if prompts.iter().any(Prompt::is_empty) {
            return Err(Error::invalid("prompt", "the prompt is empty"));
        }
        let logprobs = fields.logprobs_count()?;
        let params = fields.params(logprobs)?;
        if prompts.len() * params.n as usize > MOST_PROMPTS {
            let message = format!("{} prompts with {} choices each: more than {MOST_PROMPTS}", prompts.len(), params.n);
            return Err(Error::invalid("n", message));
        }
        // For completions only: a chat's template says where special tokens stand.
        if fields.0.get("add_special_tokens") == Some(&json!(true)) {
            fields.0.shift_remove("add_special_tokens");
        }
        body.unknown.map_or(Ok(()), |name| Err(Error::unsupported(name)))?;
        fields.nothing_else(params.n)?;
        for (name, given) in [("messages", body.messages), ("tools", body.tools)] {
            given.map_or(Ok(()), |_| Err(Error::unsupported(name)))?;
        }
        Ok(Self { model, prompts, params })
    }
}

impl Chat {
    /// Reads and checks a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let body = parse(body)?;
        if body.prompt.as_ref().is_some_and(|prompt| *prompt != Prompt::Other("null")) {
            return Err(Error::unsupported("prompt"));
        }
        let mut fields = Fields(body.fields);
        let model = fields.model()?;
        let Some(Parsed(messages)) = body.messages else {
            return Err(Error::invalid("messages", "the messages are missing"));
        };
        let messages = check_messages(&messages)?;
        let tools = body.tools.map_or(Ok(None), |Parsed(tools)| check_tools(tools))?;
        // Told to call none, the model is not told of them.
        let mute = fields.0.get("tool_choice") == Some(&json!("none"));
        if mute {
            fields.0.shift_remove("tool_choice");
        }
        let tools = tools.filter(|_| !mute);
        let logprobs = fields.logprobs_flag()?;
        let params = fields.params(logprobs)?;
        if fields.0.get("add_special_tokens") == Some(&json!(false)) {
            fields.0.shift_remove("add_special_tokens");
        }
        body.unknown.map_or(Ok(()), |name| Err(Error::unsupported(name)))?;
        fields.nothing_else(params.n)?;
        Ok(Self { model, messages, tools, params })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(extra: &str) -> Result<Completion, Error> {
        let comma = if extra.is_empty() { "" } else { "," };
        Completion::parse(format!(r#"{{"model": "tiny", "prompt": "hi"{comma} {extra}}}"#).as_bytes())
    }

    fn chat(extra: &str) -> Result<Chat, Error> {
        Chat::parse(
            format!(r#"{{"model": "tiny", "messages": [{{"role": "user", "content": "hi"}}], {extra}}}"#).as_bytes(),
        )
    }

    fn at_fault(error: &Error) -> (u16, Value) {
        (error.status().as_u16(), error.body()["error"]["param"].clone())
    }

    #[test]
    fn values_out_of_range_are_named() {
        let table = [
            (r#""max_tokens": 0"#, "max_tokens"),
            (r#""max_tokens": -1"#, "max_tokens"),
            (r#""max_tokens": 4294967296"#, "max_tokens"),
            (r#""max_tokens": 1.5"#, "max_tokens"),
            (r#""max_tokens": "5""#, "max_tokens"),
            (r#""max_completion_tokens": 0"#, "max_completion_tokens"),
            (r#""min_tokens": -1"#, "min_tokens"),
            (r#""temperature": -0.1"#, "temperature"),
            (r#""temperature": 2.1"#, "temperature"),
            (r#""temperature": "warm""#, "temperature"),
            (r#""seed": 1.5"#, "seed"),
            (r#""stop": 5"#, "stop"),
            (r#""stop": [5]"#, "stop"),
            (r#""stop": """#, "stop"),
            (r#""stop_token_ids": [-1]"#, "stop_token_ids"),
            (r#""stream": "yes""#, "stream"),
            (r#""stream_options": {"include_usage": true}"#, "stream_options"),
            (r#""ignore_eos": 1"#, "ignore_eos"),
            (r#""n": 0"#, "n"),
            (r#""n": 129"#, "n"),
            (r#""n": 1.5"#, "n"),
            (r#""top_k": -2"#, "top_k"),
            (r#""top_k": 1.5"#, "top_k"),
            (r#""top_p": 1.1"#, "top_p"),
            (r#""top_p": true"#, "top_p"),
            (r#""min_p": -0.1"#, "min_p"),
            (r#""repetition_penalty": -1"#, "repetition_penalty"),
            (r#""presence_penalty": 2.1"#, "presence_penalty"),
            (r#""frequency_penalty": -2.1"#, "frequency_penalty"),
            (r#""logprobs": 21"#, "logprobs"),
            (r#""logprobs": true"#, "logprobs"),
            (r#""logit_bias": {"five": 1}"#, "logit_bias"),
            (r#""logit_bias": {"-5": 1}"#, "logit_bias"),
            (r#""logit_bias": {"+5": 1}"#, "logit_bias"),
            (r#""logit_bias": {"4294967296": 1}"#, "logit_bias"),
            (r#""logit_bias": {"5": 101}"#, "logit_bias"),
            (r#""logit_bias": {"5": null}"#, "logit_bias"),
            (r#""logit_bias": [5]"#, "logit_bias"),
        ];
        for (field, param) in table {
            let error = completion(field).expect_err(field);
            assert_eq!(at_fault(&error), (400, json!(param)), "{field}: {error}");
        }
    }

    #[test]
    fn what_would_change_the_answer_is_unsupported() {
        let table = [
            (r#""best_of": 2"#, "best_of"),
            (r#""n": 2, "best_of": 3"#, "best_of"),
            (r#""top_logprobs": 5"#, "top_logprobs"),
            (r#""prompt_logprobs": 1"#, "prompt_logprobs"),
            (r#""store": true"#, "store"),
            (r#""echo": true"#, "echo"),
            (r#""suffix": "x""#, "suffix"),
            (r#""guided_json": {}"#, "guided_json"),
            (r#""no_such_field": 1"#, "no_such_field"),
            (r#""service_tier": "scale""#, "service_tier"),
        ];
        for (field, param) in table {
            let error = completion(field).expect_err(field);
            assert_eq!(at_fault(&error), (400, json!(param)), "{field}");
            assert_eq!(error.body()["error"]["code"], "unsupported_parameter");
        }
        for field in
            [r#""response_format": {"type": "json_object"}"#, r#""tool_choice": "required""#, r#""echo": true"#]
        {
            chat(field).expect_err(field);
        }
    }

    #[test]
    fn neutral_values_are_accepted() {
        for field in [
            r#""top_p": 1, "user": "me", "metadata": {"a": "b"}"#,
            r#""n": 3, "best_of": 3"#,
            r#""logit_bias": {}"#,
            r#""suffix": null"#,
            r#""unknown": null"#,
            r#""presence_penalty": 0.0, "frequency_penalty": 0"#,
            r#""best_of": 1, "echo": false"#,
            r#""service_tier": "auto""#,
            r#""service_tier": "flex""#,
            r#""temperature": 0, "seed": -5, "stop": ["a", "b"], "max_tokens": 4294967295"#,
            "",
            r#""stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}"#,
        ] {
            completion(field).expect(field);
        }
        chat(r#""response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": true"#)
            .expect("neutral");
    }

    #[test]
    fn sampling_is_read_as_it_is_given() {
        let all = r#""n": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
            "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"5": -100, "7": 1.5}, "logprobs": 3"#;
        let params = completion(all).expect("all of it").params;
        let sampling = Sampling {
            temperature: 0.5,
            top_k: 40,
            top_p: Some(0.9),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(2.0),
            seed: 0,
            logit_bias: [(5, -100.0), (7, 1.5)].into(),
            logprobs: Some(3),
        };
        assert_eq!((params.n, params.sampling), (4, sampling));
        let unset = completion(r#""top_k": -1"#).expect("nothing of it").params;
        assert_eq!((unset.n, unset.sampling), (1, Sampling { temperature: 1.0, ..Sampling::default() }));
    }

    #[test]
    fn the_priority_tier_is_urgent_and_no_other_is() {
        for (tier, urgent) in [("null", false), (r#""default""#, false), (r#""flex""#, false), (r#""priority""#, true)]
        {
            let field = format!(r#""service_tier": {tier}"#);
            assert_eq!(completion(&field).expect(&field).params.urgent, urgent, "{field}");
            assert_eq!(chat(&field).expect(&field).params.urgent, urgent, "{field}");
        }
        assert_eq!(at_fault(&chat(r#""service_tier": 1"#).expect_err("a number")), (400, json!("service_tier")));
    }

    #[test]
    fn a_chat_says_whether_and_how_many_logprobs() {
        let asked = |fields: &str| chat(fields).map(|chat| chat.params.sampling.logprobs);
        assert_eq!(asked(r#""logprobs": true"#), Ok(Some(0)));
        assert_eq!(asked(r#""logprobs": true, "top_logprobs": 20"#), Ok(Some(20)));
        assert_eq!(asked(r#""logprobs": false, "top_logprobs": 0"#), Ok(None));
        for (fields, param) in [
            (r#""top_logprobs": 2"#, "top_logprobs"),
            (r#""logprobs": false, "top_logprobs": 2"#, "top_logprobs"),
            (r#""logprobs": true, "top_logprobs": 21"#, "top_logprobs"),
            (r#""logprobs": 3"#, "logprobs"),
        ] {
            assert_eq!(at_fault(&asked(fields).expect_err(fields)), (400, json!(param)), "{fields}");
        }
    }

    #[test]
    fn broken_bodies_are_bad_requests() {
        let bodies: [&[u8]; 11] = [
            b"",
            b"{",
            b"[]",
            b"5",
            b"null",
            br#"{"model": "tiny", "prompt": "hi", "temperature": NaN}"#,
            br#"{"model": "tiny", "prompt": "hi", "temperature": 1e999}"#,
            b"{\"model\": \"\xff\", \"prompt\": \"a\"}",
            b"{\"model\": \"tiny\", \"prompt\": \"\xc3\x28\"}",
            br#"{"model": "tiny", "prompt": "\ud800"}"#,
            br#"{"model": "tiny", "prompt": "hi"} x"#,
        ];
        for body in bodies {
            let error = Completion::parse(body).expect_err("broken");
            assert_eq!(error.status(), 400);
            assert_eq!(error.body()["error"]["type"], "invalid_request_error");
        }
        let deep =
            format!("{{\"model\": \"tiny\", \"prompt\": \"a\", \"x\": {}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        Completion::parse(deep.as_bytes()).expect_err("too deep");
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let parse = |prompt: &str| Completion::parse(format!(r#"{{"model": "tiny", "prompt": {prompt}}}"#).as_bytes());
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(parse(r#""hi""#).expect("text").prompts, [text("hi")]);
        assert_eq!(parse("[1, 2]").expect("ids").prompts, [Prompt::Ids(vec![1, 2])]);
        assert_eq!(parse(r#"["hi"]"#).expect("one text").prompts, [text("hi")]);
        assert_eq!(parse("[[1, 2]]").expect("one list").prompts, [Prompt::Ids(vec![1, 2])]);
        assert_eq!(parse(r#"["a", "b"]"#).expect("texts").prompts, [text("a"), text("b")]);
        assert_eq!(parse("[[1], [2, 3]]").expect("lists").prompts, [Prompt::Ids(vec![1]), Prompt::Ids(vec![2, 3])]);
        for wrong in [
            r#""""#,
            "[]",
            "[[]]",
            r#"["a", ""]"#,
            "[[1], []]",
            r#"["a", null]"#,
            r#"[1, "a"]"#,
            r#"["a", 1]"#,
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[null]",
            "[true]",
            "[{}]",
            "5",
            "null",
            "{}",
            "true",
            "[[1, \"a\"]]",
            "[[[1]]]",
        ] {
            let error = parse(wrong).expect_err(wrong);
            assert_eq!(at_fault(&error), (400, json!("prompt")), "{wrong}");
        }
        assert_eq!(at_fault(&Completion::parse(br#"{"model": "tiny"}"#).expect_err("missing")), (400, json!("prompt")));
    }

    #[test]
    fn choices_of_all_prompts_are_bounded() {
        let prompts = |count: usize, n: u32| {
            let prompts = vec!["a"; count];
            let body = json!({"model": "tiny", "prompt": prompts, "n": n}).to_string();
            Completion::parse(body.as_bytes()).map(|completion| completion.prompts.len())
        };
        assert_eq!(prompts(1024, 1), Ok(1024));
        assert_eq!(at_fault(&prompts(1025, 1).expect_err("prompts")), (400, json!("prompt")));
        assert_eq!(prompts(8, 128), Ok(8));
        assert_eq!(at_fault(&prompts(9, 128).expect_err("choices")), (400, json!("n")));
    }

    #[test]
    fn messages_are_checked() {
        let parse = |messages: &str| Chat::parse(format!(r#"{{"model": "tiny", "messages": {messages}}}"#).as_bytes());
        for right in [
            r#"[{"role": "user", "content": "hi"}]"#,
            r#"[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]"#,
            r#"[{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "ok"}]"#,
        ] {
            parse(right).expect(right);
        }
        for wrong in [
            "[]",
            "{}",
            "[5]",
            r#"[{"content": "hi"}]"#,
            r#"[{"role": "king", "content": "hi"}]"#,
            r#"[{"role": "user", "content": null}]"#,
            r#"[{"role": "user", "content": 5}]"#,
            r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]"#,
            r#"[{"role": "user", "content": [{"type": "text"}]}]"#,
            r#"[{"role": "assistant", "content": "a", "tool_calls": {}}]"#,
            r#"[{"role": "assistant", "content": "a", "tool_calls": [{}]}]"#,
        ] {
            let error = parse(wrong).expect_err(wrong);
            assert_eq!(at_fault(&error), (400, json!("messages")), "{wrong}");
        }
    }

    #[test]
    fn tools_are_checked() {
        let tool = r#"{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}"#;
        assert!(chat(&format!(r#""tools": [{tool}]"#)).expect("a tool").tools.is_some());
        assert!(chat(r#""tools": []"#).expect("no tools").tools.is_none());
        for wrong in
            [r#""tools": {}"#, r#""tools": [5]"#, r#""tools": [{"type": "function"}]"#, r#""tools": [{"type": "web"}]"#]
        {
            chat(wrong).expect_err(wrong);
        }
        assert!(chat(&format!(r#""tools": [{tool}], "tool_choice": "auto""#)).expect("tools").tools.is_some());
        assert!(chat(&format!(r#""tools": [{tool}], "tool_choice": "none""#)).expect("muted").tools.is_none());
        chat(&format!(r#""tools": [{tool}], "tool_choice": {{"type": "function"}}"#)).expect_err("named");
    }
}
