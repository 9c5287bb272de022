//! Bodies that are almost right, over a real socket: whatever comes, the answer is in time, JSON, and of a status that
//! the document has; what is served the document allows; and no worker is ever given what it has to refuse.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Answer, Router, Worker, config, request};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use router_server::openapi::document;
use serde_json::{Value, json};

/// JSON as text, so that it can also be none: with keys twice, numbers that no type holds, halves of characters.
#[derive(Clone, Debug)]
enum Node {
    Raw(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

impl Node {
    fn of(value: &Value) -> Self {
        match value {
            Value::Array(items) => Self::List(items.iter().map(Self::of).collect()),
            Value::Object(fields) => {
                Self::Object(fields.iter().map(|(key, value)| (json!(key).to_string(), Self::of(value))).collect())
            }
            other => Self::Raw(other.to_string()),
        }
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Raw(text) => out.push_str(text),
            Self::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    item.write(out);
                }
                out.push(']');
            }
            Self::Object(fields) => {
                out.push('{');
                for (at, (key, value)) in fields.iter().enumerate() {
                    out.push_str(if at > 0 { "," } else { "" });
                    out.push_str(key);
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
        }
    }

    /// All nodes below, in order; this one too.
    fn count(&self) -> usize {
        1 + match self {
            Self::Raw(_) => 0,
            Self::List(items) => items.iter().map(Self::count).sum(),
            Self::Object(fields) => fields.iter().map(|(_, value)| value.count()).sum(),
        }
    }

    /// The node of this number, counted as [`Node::count`] does.
    fn at(&mut self, number: usize) -> &mut Self {
        let mut left = number;
        if left == 0 {
            return self;
        }
        left -= 1;
        let below: Vec<&mut Self> = match self {
            Self::Raw(_) => Vec::new(),
            Self::List(items) => items.iter_mut().collect(),
            Self::Object(fields) => fields.iter_mut().map(|(_, value)| value).collect(),
        };
        for node in below {
            match node.count() {
                count if left < count => return node.at(left),
                count => left -= count,
            }
        }
        unreachable!("a number below the count")
    }
}

/// Done to a body.
#[derive(Clone, Debug)]
enum Mutation {
    /// A node, by its place among all, becomes this.
    Replace(prop::sample::Index, Node),
    /// A field of the whole gets this value.
    Set(String, &'static str),
    /// A field is added to an object or a list, or to the whole.
    Add(prop::sample::Index, String, Node),
    /// A member of an object comes twice, the second time as this.
    Twice(prop::sample::Index, Node),
    /// A node so deep in lists or objects.
    Deep(prop::sample::Index, usize, bool),
    /// A member goes.
    Remove(prop::sample::Index),
    /// Bytes are put over those that are there.
    Bytes(prop::sample::Index, Vec<u8>),
    /// It ends here.
    Cut(prop::sample::Index),
}

const PATHS: [&str; 4] = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"];

fn bases() -> Vec<(&'static str, Value)> {
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let talk = json!([{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "t"}]);
    vec![
        (PATHS[0], json!({"model": "tiny", "prompt": "hi", "max_tokens": 4})),
        (
            PATHS[0],
            json!({"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "min_tokens": 2, "seed": 5,
            "stop": ["a", "b"], "stop_token_ids": [9], "ignore_eos": true, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
            "min_p": 0.1, "logit_bias": {"5": 1.5}, "repetition_penalty": 1.1, "presence_penalty": 0.5,
            "frequency_penalty": -0.5, "n": 2, "logprobs": 2, "return_token_ids": true}),
        ),
        (PATHS[0], json!({"model": "tiny", "prompt": "hi", "stream": true, "stream_options": {"include_usage": true}})),
        (PATHS[1], json!({"model": "tiny", "messages": talk, "tools": [tool], "max_completion_tokens": 4, "top_p": 1})),
        (
            PATHS[1],
            json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": true,
            "top_logprobs": 3, "stream": true, "max_tokens": 3, "response_format": {"type": "text"}, "user": "me"}),
        ),
        (PATHS[2], json!({"model": "tiny", "prompt": "hi", "return_token_strs": true, "add_special_tokens": true})),
        (PATHS[2], json!({"model": "tiny", "messages": talk, "tools": [tool], "add_generation_prompt": true})),
        (PATHS[3], json!({"model": "tiny", "tokens": [5, 6, 7]})),
    ]
}

/// The fields of all requests, and some of none.
fn names() -> Vec<String> {
    let schemas = &document()["components"]["schemas"];
    let requests = ["Params", "CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"];
    let fields = requests.iter().flat_map(|request| schemas[request]["properties"].as_object().unwrap().keys());
    fields.cloned().chain(["guided_json".into(), String::new(), "a".repeat(10_000)]).collect()
}

/// Fields with values at their borders: what a worker would have to refuse if we did not.
const BORDERS: [(&str, &str); 36] = [
    ("prompt", "[2559]"),
    ("prompt", "[2560]"),
    ("tokens", "[2560]"),
    ("stop_token_ids", "[2559]"),
    ("stop_token_ids", "[5,2560]"),
    ("stop_token_ids", "[4294967295]"),
    ("logit_bias", "{\"2559\":-100}"),
    ("logit_bias", "{\"2560\":1}"),
    ("logit_bias", "{\"4294967296\":1}"),
    ("logit_bias", "{\"5\":100.00000001}"),
    ("min_tokens", "4"),
    ("min_tokens", "5"),
    ("min_tokens", "4294967295"),
    ("max_tokens", "290"),
    ("max_tokens", "300"),
    ("max_completion_tokens", "1"),
    ("temperature", "-1e-60"),
    ("temperature", "2.00000001"),
    ("top_p", "0"),
    ("top_p", "1e-60"),
    ("top_p", "1.00000001"),
    ("top_k", "-1"),
    ("top_k", "4294967295"),
    ("min_p", "1"),
    ("min_p", "1.00000001"),
    ("repetition_penalty", "0"),
    ("repetition_penalty", "1e-60"),
    ("repetition_penalty", "1e39"),
    ("presence_penalty", "-2.00000001"),
    ("frequency_penalty", "2.00000001"),
    ("n", "8"),
    ("n", "129"),
    ("logprobs", "20"),
    ("logprobs", "21"),
    ("top_logprobs", "20"),
    ("seed", "-1"),
];

fn hostile() -> impl Strategy<Value = Node> {
    let raw = prop::sample::select(vec![
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-0.0",
        "1",
        "-1",
        "2",
        "20",
        "21",
        "128",
        "129",
        "1024",
        "0.5",
        "1e-400",
        "1e400",
        "-1e400",
        "1e308",
        "4294967295",
        "4294967296",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        "99999999999999999999999999999999999999999",
        "2559",
        "2560",
        "NaN",
        "Infinity",
        "-Infinity",
        "\"NaN\"",
        "\"\"",
        "\"5\"",
        "\"a\"",
        "\"auto\"",
        "\"none\"",
        "\"user\"",
        "\"text\"",
        "\"\\ud800\"",
        "\"\\udc00\\ud800\"",
        "\"\\u0000\"",
        "\"\\ud83d\\ude00\"",
        "\"\u{fffd}\u{10ffff}\"",
        "\"<|im_start|><|im_end|>{{ x }}{% raw %}\"",
        "{}",
        "[]",
        "[[]]",
        "{\"\":null}",
        "[null]",
        "[\"\"]",
        "[1.5]",
        "[-1]",
        "{\"5\":1}",
        "{\"5\":101}",
        "{\"99999\":1}",
        "{\"-1\":1}",
        "{\"5\":1,\"05\":2}",
        "{\"type\":\"text\"}",
        "{\"include_usage\":true,\"include_usage\":5}",
        "01",
        "1.",
        ".5",
        "+1",
        "0x10",
        "'a'",
        "undefined",
        "",
        ",",
    ]);
    prop_oneof![
        8 => raw.prop_map(|text| Node::Raw(text.to_owned())),
        2 => any::<f64>().prop_map(|number| Node::Raw(json!(number).to_string())),
        2 => any::<String>().prop_map(|text| Node::Raw(json!(text).to_string())),
        1 => (1..3000usize).prop_map(|count| Node::Raw(json!("\u{e4} ".repeat(count)).to_string())),
        1 => prop::collection::vec(0..4000u32, 0..300).prop_map(|ids| Node::of(&json!(ids))),
        1 => prop::collection::vec((0..4000u32, -200.0..200f64), 0..1100)
            .prop_map(|all| Node::Object(all.into_iter().map(|(id, bias)| (format!("\"{id}\""), Node::Raw(bias.to_string()))).collect())),
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    let key = prop::sample::select(names()).prop_map(|name| json!(name).to_string());
    prop_oneof![
        6 => (index(), hostile()).prop_map(|(at, node)| Mutation::Replace(at, node)),
        4 => (index(), key, hostile()).prop_map(|(at, key, node)| Mutation::Add(at, key, node)),
        6 => prop::sample::select(&BORDERS[..]).prop_map(|(key, value)| Mutation::Set(json!(key).to_string(), value)),
        2 => (index(), hostile()).prop_map(|(at, node)| Mutation::Twice(at, node)),
        1 => (index(), prop_oneof![1..200usize, Just(20_000)], any::<bool>()).prop_map(|(at, depth, list)| Mutation::Deep(at, depth, list)),
        2 => index().prop_map(Mutation::Remove),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..4)).prop_map(|(at, bytes)| Mutation::Bytes(at, bytes)),
        1 => index().prop_map(Mutation::Cut),
    ]
}

/// The members of an object somewhere in there: of the whole where the place has none.
fn members(node: &mut Node, at: prop::sample::Index) -> Option<&mut Vec<(String, Node)>> {
    let number = at.index(node.count());
    let place = if matches!(node.at(number), Node::Object(_)) { number } else { 0 };
    match node.at(place) {
        Node::Object(members) => Some(members),
        _ => None,
    }
}

fn mutated(base: &Value, mutations: &[Mutation]) -> Vec<u8> {
    let mut node = Node::of(base);
    for mutation in mutations {
        match mutation {
            Mutation::Replace(at, with) => {
                let number = at.index(node.count());
                *node.at(number) = with.clone();
            }
            Mutation::Set(key, value) => {
                if let Node::Object(members) = &mut node {
                    members.retain(|(name, _)| name != key);
                    members.push((key.clone(), Node::Raw((*value).to_owned())));
                }
            }
            Mutation::Add(at, key, with) => {
                if let Some(members) = members(&mut node, *at) {
                    members.push((key.clone(), with.clone()));
                }
            }
            Mutation::Twice(at, with) => {
                if let Some(members) = members(&mut node, *at).filter(|members| !members.is_empty()) {
                    let key = members[at.index(members.len())].0.clone();
                    members.push((key, with.clone()));
                }
            }
            Mutation::Deep(at, depth, list) => {
                let number = at.index(node.count());
                let (open, close) = if *list { ("[", "]") } else { ("{\"a\":", "}") };
                *node.at(number) = Node::Raw(format!("{}0{}", open.repeat(*depth), close.repeat(*depth)));
            }
            Mutation::Remove(at) => {
                if let Some(members) = members(&mut node, *at).filter(|members| !members.is_empty()) {
                    members.remove(at.index(members.len()));
                }
            }
            Mutation::Bytes(..) | Mutation::Cut(_) => {}
        }
    }
    let mut text = String::new();
    node.write(&mut text);
    let mut bytes = text.into_bytes();
    for mutation in mutations {
        match mutation {
            Mutation::Bytes(at, with) if !bytes.is_empty() => {
                let at = at.index(bytes.len());
                let end = (at + with.len()).min(bytes.len());
                bytes.splice(at..end, with.iter().copied());
            }
            Mutation::Cut(at) if !bytes.is_empty() => bytes.truncate(at.index(bytes.len())),
            _ => {}
        }
    }
    bytes
}

/// What must hold of every answer.
struct Checks {
    requests: Vec<(&'static str, jsonschema::Validator)>,
    error: jsonschema::Validator,
}

impl Checks {
    fn new() -> Self {
        let document = document();
        let schema = |name: &str| {
            let reference = format!("#/components/schemas/{name}");
            jsonschema::draft202012::new(&json!({"$ref": reference, "components": document["components"]})).unwrap()
        };
        let names = ["CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"];
        Self { requests: PATHS.into_iter().zip(names.map(schema)).collect(), error: schema("Error") }
    }

    fn check(&self, path: &str, body: &[u8], answer: &Answer) -> Result<(), TestCaseError> {
        let shown = String::from_utf8_lossy(&body[..body.len().min(2000)]).into_owned();
        match answer.status {
            200 => {
                let request = &self.requests.iter().find(|(of, _)| *of == path).unwrap().1;
                match serde_json::from_slice::<Value>(body) {
                    Ok(body) => {
                        prop_assert!(
                            request.is_valid(&body),
                            "{path} served what the document does not allow: {shown}"
                        );
                    }
                    // a value that a later one of the same name replaces is skipped and not read, however deep it is
                    Err(error) if error.to_string().starts_with("recursion limit exceeded") => {}
                    Err(error) => return Err(TestCaseError::fail(error.to_string())),
                }
                if answer.header("content-type").unwrap().starts_with("text/event-stream") {
                    prop_assert!(answer.body.ends_with("data: [DONE]\n\n"), "{path}: {shown}: {}", answer.body);
                } else {
                    prop_assert!(serde_json::from_str::<Value>(&answer.body).is_ok(), "{}", answer.body);
                }
            }
            // 5xx is a bug, of ours or in what we let through to the worker.
            400 | 404 => {
                prop_assert!(self.error.is_valid(&answer.json()), "{path}: {shown}: {}", answer.body);
            }
            other => prop_assert!(false, "{path}: {other} for {shown}: {}", answer.body),
        }
        Ok(())
    }
}

/// Short in `cargo test`; `SCLS_SOAK=1` makes it long.
#[test]
fn bodies_that_are_almost_right() {
    let cases = if std::env::var_os("SCLS_SOAK").is_some() { 200_000 } else { 3000 };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (worker, router) = runtime.block_on(async {
        let worker = Worker::start("--max-context 300 --blocks 256").await;
        let router = Router::over(&[&worker], config()).await;
        (worker, router)
    });
    let checks = Checks::new();
    let mut served = [0u32; 2];
    let body = (prop::sample::select(bases()), prop::collection::vec(mutation(), 0..4));
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2000, ..ProptestConfig::default() };
    let served_of = std::cell::RefCell::new(&mut served);
    let result = TestRunner::new(config).run(&body, |((path, base), mutations)| {
        let body = mutated(&base, &mutations);
        let asked = request(router.http, "POST", path, &body);
        let answer = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), asked).await });
        let answer = answer.map_err(|_| TestCaseError::fail(format!("no answer: {mutations:?}")))?;
        served_of.borrow_mut()[usize::from(answer.status == 200)] += 1;
        checks.check(path, &body, &answer)
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    assert!(served.iter().all(|count| *count > cases / 10), "refused and served: {served:?}");
    runtime.block_on(async {
        router.until_drained().await;
        let metrics = router.get("/metrics").await.body;
        // Stale is a race of plans and says nothing of what is in them.
        let refused = metrics.lines().filter(|line| line.starts_with("scls_router_plans_refused_total{"));
        let refused: Vec<_> = refused.filter(|line| !line.contains("stale")).collect();
        assert!(refused.is_empty(), "a worker was given what it has to refuse: {refused:?}");
        assert!(!metrics.contains("scls_router_quarantines_total{"), "{metrics}");
        assert_eq!(router.complete(&[5], 2).await, common::drawn(&[5], 2));
    });
    drop(worker);
}
