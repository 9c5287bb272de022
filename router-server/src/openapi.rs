//! `GET /openapi.json`: the contract of the HTTP listeners, kept by hand in `openapi.json` and held to the handlers by
//! the tests below, by `tests/openapi.rs` (answers) and by `tests/fuzz.rs` (whatever is served, it allows).

use std::sync::LazyLock;

use axum::http::{HeaderName, header};
use bytes::Bytes;
use serde_json::{Value, json};

static BYTES: LazyLock<Bytes> = LazyLock::new(|| document().to_string().into());

/// The document, with the version of this build.
pub fn document() -> Value {
    let mut document: Value = serde_json::from_str(include_str!("../openapi.json")).expect("a test reads it");
    document["info"]["version"] = json!(env!("CARGO_PKG_VERSION"));
    document
}

/// `GET /openapi.json`.
pub async fn openapi() -> ([(HeaderName, &'static str); 1], Bytes) {
    ([(header::CONTENT_TYPE, "application/json")], BYTES.clone())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Map;

    use super::*;
    use crate::error::Error;
    use crate::fields;
    use crate::request::{Chat, Completion};
    use crate::tokenize;

    fn properties(schema: &str) -> BTreeSet<String> {
        let document = document();
        let schema = &document["components"]["schemas"][schema];
        schema["properties"].as_object().expect("an object").keys().cloned().collect()
    }

    fn set(names: impl IntoIterator<Item = &'static str>) -> BTreeSet<String> {
        names.into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn check(document: &Value, at: &Value) {
            match at {
                Value::Object(fields) => {
                    if let Some(to) = fields.get("$ref").and_then(Value::as_str) {
                        assert!(document.pointer(to.trim_start_matches('#')).is_some(), "{to}");
                    }
                    fields.values().for_each(|value| check(document, value));
                }
                Value::Array(items) => items.iter().for_each(|item| check(document, item)),
                _ => {}
            }
        }
        let document = document();
        check(&document, &document);
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn the_fields_are_those_that_the_parsers_know() {
        let both = &properties("Params") | &(&properties("CompletionRequest") | &properties("ChatRequest"));
        assert_eq!(both, set(fields::known().chain(["prompt"])));
        assert_eq!(properties("TokenizeRequest"), set(tokenize::TOKENIZE));
        assert_eq!(properties("DetokenizeRequest"), set(tokenize::DETOKENIZE));
    }

    /// A request as its schema sees it and as its parser does.
    struct Endpoint {
        schema: &'static str,
        base: Value,
        parse: fn(&[u8]) -> Result<(), Error>,
    }

    const ENDPOINTS: [fn() -> Endpoint; 4] = [
        || Endpoint {
            schema: "CompletionRequest",
            base: json!({"model": "m", "prompt": "a", "stream": true}),
            parse: |body| Completion::parse(body).map(drop),
        },
        || Endpoint {
            schema: "ChatRequest",
            base: json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": true, "logprobs": true}),
            parse: |body| Chat::parse(body).map(drop),
        },
        || Endpoint {
            schema: "TokenizeRequest",
            base: json!({"model": "m", "prompt": "a"}),
            parse: tokenize::check_tokenize,
        },
        || Endpoint {
            schema: "DetokenizeRequest",
            base: json!({"model": "m", "tokens": [5]}),
            parse: tokenize::check_detokenize,
        },
    ];

    /// Values of every kind, on both sides of every border that some field has.
    fn values() -> Vec<Value> {
        let text = r#"[null, true, false, 0, 1, -1, -2, 2, 3, -3, 0.5, 1.5, 1e-9, 1e300, 2.1, -0.1, 20, 21, 128, 129,
            4294967295, 4294967296, 9223372036854775807, -9223372036854775808, 18446744073709551615, 1e20,
            "", "a", "auto", "none", "default", "flex", "priority", "required", "1", {}, {"a": 1}, {"type": "text"}, {"type": "json_object"},
            {"5": 1}, {"5": 100.5}, {"5": "a"}, {"-5": 1}, {"include_usage": true}, {"include_usage": 1},
            {"include_usage": null, "include_obfuscation": false}, {"other": null}, {"other": 1},
            [], ["a"], [""], ["a", "b"], [5], [5, 6], [-5], [5.5], [[5, 6]], [[]], [[5], [6]], ["text"], ["text", "audio"],
            [{"role": "user"}], [{"role": "assistant"}], [{"role": "pirate", "content": "a"}], [{"role": 5}],
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user", "content": []}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], [{"role": "user", "content": 5}],
            [{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]}],
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}], [{"role": "assistant", "tool_calls": [{}]}],
            [{"type": "function", "function": {"name": "f"}}], [{"type": "function"}], [{"type": "web_search"}]]"#;
        serde_json::from_str(text).expect("values")
    }

    /// Where the two may differ: the parser asks for what a schema cannot well say (two fields, or a user's message that
    /// has no content), or leaves a range with an open end to the pool.
    fn may_differ(field: &str, value: &Value) -> bool {
        match field {
            "best_of" => value != &json!(1),
            "top_p" | "repetition_penalty" => value == &json!(0),
            "messages" => value == &json!([{"role": "user"}]),
            // These go with messages, the others with a prompt.
            "tokenize messages" | "tokenize tools" | "tokenize add_special_tokens" => true,
            "tokenize prompt" => value.is_null(),
            _ => false,
        }
    }

    #[test]
    fn a_schema_allows_what_its_parser_takes_and_nothing_else() {
        let document = document();
        let mut differences = Vec::new();
        for endpoint in ENDPOINTS.map(|endpoint| endpoint()) {
            let reference = format!("#/components/schemas/{}", endpoint.schema);
            let schema = json!({"$ref": reference, "components": document["components"]});
            let schema = jsonschema::draft202012::new(&schema).expect("a schema");
            let check = |body: &Map<String, Value>| {
                let body = Value::Object(body.clone());
                let parsed = (endpoint.parse)(body.to_string().as_bytes());
                let differ = schema.is_valid(&body) != parsed.is_ok();
                differ.then(|| format!("{}: {body}: {parsed:?}", endpoint.schema))
            };
            let base = endpoint.base.as_object().expect("an object");
            differences.extend(check(base));
            let names =
                fields::known().chain(tokenize::TOKENIZE).chain(tokenize::DETOKENIZE).chain(["guided_json", "x"]);
            for field in names {
                let of_schema = if endpoint.schema == "TokenizeRequest" { "tokenize " } else { "" }.to_owned() + field;
                for value in values().into_iter().filter(|value| !may_differ(&of_schema, value)) {
                    let mut body = base.clone();
                    body.insert(field.into(), value);
                    differences.extend(check(&body));
                }
                let mut body = base.clone();
                body.shift_remove(field);
                if of_schema != "tokenize prompt" {
                    differences.extend(check(&body));
                }
            }
        }
        assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    }
}
