//! Answers of live handlers against the document: statuses, headers and bodies, with nothing in them that it lacks.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Answer, Router, Worker, config, request};
use router_server::auth::Keys;
use router_server::openapi::document;
use serde_json::{Value, json};

/// Our answers have no fields that the document does not know, though clients are to expect some.
fn strictly(schema: &mut Value) {
    if let Value::Object(fields) = schema {
        if fields.contains_key("properties") && !fields.contains_key("additionalProperties") {
            fields.insert("additionalProperties".into(), json!(false));
        }
        fields.values_mut().for_each(strictly);
    } else if let Value::Array(items) = schema {
        items.iter_mut().for_each(strictly);
    }
}

struct Document {
    whole: Value,
    strict: Value,
}

impl Document {
    fn new() -> Self {
        let whole = document();
        let mut strict = whole["components"].clone();
        strictly(&mut strict);
        Self { whole, strict }
    }

    fn follow<'a>(&'a self, item: &'a Value) -> &'a Value {
        item["$ref"].as_str().map_or(item, |to| self.whole.pointer(to.trim_start_matches('#')).unwrap())
    }

    /// Checks an answer to a method on a path of the document.
    fn check(&self, method: &str, path: &str, answer: &Answer) {
        let operation = &self.follow(&self.whole["paths"][path])[method];
        let told = self.follow(&operation["responses"][answer.status.to_string()]);
        assert!(told.is_object(), "{method} {path}: {} is not in the document: {}", answer.status, answer.body);
        for (name, header) in told["headers"].as_object().into_iter().flatten() {
            let value = answer.header(name);
            if name == "x-scls-cached-tokens" && answer.header("content-type").unwrap().starts_with("text/event-stream")
            {
                assert_eq!(value, None);
                continue;
            }
            if name == "x-scls-eta-ms" {
                // Not where nothing is foreseen.
                for ends in value.iter().map(|value| value.split_once('-').unwrap()) {
                    assert!(ends.0.parse::<u64>().unwrap() <= ends.1.parse().unwrap(), "{value:?}");
                }
                continue;
            }
            let value = value.unwrap_or_else(|| panic!("{method} {path}: {name} is missing"));
            if self.follow(header)["schema"]["type"] == "integer" {
                value.parse::<u64>().unwrap();
            }
        }
        let kind = answer.header("content-type").unwrap().split(';').next().unwrap();
        let schema = &told["content"][kind]["schema"];
        assert!(schema.is_object(), "{method} {path}: {kind} is not in the document");
        match kind {
            "text/event-stream" => answer.events().iter().for_each(|event| self.valid(schema, event)),
            "application/json" => self.valid(schema, &answer.json()),
            _ => {}
        }
    }

    fn valid(&self, schema: &Value, body: &Value) {
        let mut schema = schema.clone();
        schema["components"] = self.strict.clone();
        let schema = jsonschema::draft202012::new(&schema).unwrap();
        if let Some(error) = schema.iter_errors(body).next() {
            panic!("{error} at {}: {body}", error.instance_path());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn live_answers_are_as_the_document_says() {
    let document = Document::new();
    let worker = Worker::start("--max-context 500").await;
    let router = Router::over(&[&worker], config()).await;
    let user = json!([{"role": "user", "content": "hello"}]);
    let posts = [
        ("/v1/completions", json!({"prompt": "hello", "max_tokens": 4})),
        ("/v1/completions", json!({"prompt": [5, 6], "max_tokens": 4, "return_token_ids": true})),
        ("/v1/completions", json!({"prompt": "hello", "max_tokens": 4, "n": 2, "logprobs": 2})),
        ("/v1/chat/completions", json!({"messages": user, "max_tokens": 4})),
        ("/v1/chat/completions", json!({"messages": user, "max_tokens": 4, "return_token_ids": true})),
        ("/v1/chat/completions", json!({"messages": user, "max_tokens": 4, "logprobs": true, "top_logprobs": 2})),
        ("/tokenize", json!({"prompt": "hello"})),
        ("/tokenize", json!({"messages": user, "return_token_strs": true})),
        ("/detokenize", json!({"tokens": [5, 6]})),
        // and what goes wrong
        ("/v1/completions", json!({"prompt": "hello", "max_tokens": 1000})),
        ("/v1/completions", json!({"prompt": "hello", "guided_json": {}})),
        ("/v1/chat/completions", json!({"messages": 5})),
        ("/tokenize", json!({"prompt": "a", "model": "big"})),
        ("/detokenize", json!({"tokens": "x".repeat(2 << 20)})),
    ];
    for (path, body) in posts {
        let mut body = body;
        body["model"] = body.get("model").cloned().unwrap_or(json!("tiny"));
        document.check("post", path, &router.post(path, &body).await);
        if path.starts_with("/v1") {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            document.check("post", path, &router.post(path, &body).await);
        }
    }
    let paths = document.whole["paths"].as_object().unwrap();
    for (path, item) in paths.iter().filter(|(_, item)| document.follow(item)["get"].is_object()) {
        let to = if item["servers"].is_null() { router.http } else { router.admin };
        let answer = request(to, "GET", &path.replace("{name}", "tiny"), b"").await;
        assert_eq!(answer.status, 200, "{path}");
        document.check("get", path, &answer);
    }
    document.check("get", "/v1/models/{name}", &router.get("/v1/models/big").await);

    let closed = Router::with_keys(&["grpc://127.0.0.1:9"], config(), Keys::parse("key").unwrap()).await;
    document.check("get", "/ready", &closed.get("/ready").await);
    for (path, item) in paths.iter().filter(|(path, item)| item["servers"].is_null() && !path.contains('{')) {
        let item = document.follow(item);
        let (method, operation) =
            [("GET", &item["get"]), ("POST", &item["post"])].into_iter().find(|o| o.1.is_object()).unwrap();
        let answer = request(closed.http, method, path, b"").await;
        // No scheme at an operation is the document's own: the key.
        assert_eq!(answer.status == 401, operation["security"].is_null(), "{path}");
        document.check(&method.to_lowercase(), path, &answer);
    }
}
