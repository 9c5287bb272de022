//! OpenAI's answers: bodies and events.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::generation::End;

/// Which of the two endpoints answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

/// What all parts of one answer have in common.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The endpoint.
    pub kind: Kind,
    /// The answer's id.
    pub id: String,
    /// The model's name as it was asked for.
    pub model: String,
    /// Unix seconds.
    pub created: u64,
    /// The client wants `"usage": null` in all events but the last.
    pub include_usage: bool,
    /// The client wants ids: those of the prompt.
    pub token_ids: Option<Arc<[u32]>>,
}

fn finish_reason(end: Option<&End>) -> Value {
    match end {
        None => Value::Null,
        Some(end) if end.stopped => json!("stop"),
        Some(_) => json!("length"),
    }
}

/// OpenAI's usage object.
pub fn usage(end: &End) -> Value {
    json!({
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    })
}

/// Our own part of an answer.
fn scls(end: &End) -> Value {
    let ttft_ms = end.ttft.map(|ttft| (ttft.as_secs_f64() * 1e6).round() / 1e3);
    json!({"worker": end.worker.as_deref(), "slices": end.slices, "ttft_ms": ttft_ms})
}

impl Answer {
    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    /// The whole answer at once.
    pub fn whole(&self, text: &str, ids: &[u32], end: &End) -> Value {
        let mut choice = match self.kind {
            Kind::Completion => json!({"index": 0, "text": text}),
            Kind::Chat => json!({"index": 0, "message": {"role": "assistant", "content": text, "refusal": null}}),
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = finish_reason(Some(end));
        if self.token_ids.is_some() {
            choice["token_ids"] = json!(ids);
        }
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        let mut answer = self.envelope(object, json!([choice]));
        self.add_prompt_ids(&mut answer);
        answer["usage"] = usage(end);
        answer["scls"] = scls(end);
        answer
    }

    fn chunk(&self, choices: Value) -> Value {
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        };
        let mut chunk = self.envelope(object, choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// The first event of a chat's stream: whose message it is.
    pub fn opening(&self) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
        (self.kind == Kind::Chat).then(|| {
            let mut chunk = self.chunk(json!([choice]));
            self.add_prompt_ids(&mut chunk);
            chunk
        })
    }

    /// Where vLLM has them: beside the choices of a chat.
    fn add_prompt_ids(&self, answer: &mut Value) {
        if let Some(ids) = self.token_ids.as_ref().filter(|_| self.kind == Kind::Chat) {
            answer["prompt_token_ids"] = json!(**ids);
        }
    }

    /// An event with text and, if they are wanted, ids; or with the reason of the end, without text.
    pub fn event(&self, text: &str, ids: &[u32], end: Option<&End>) -> Value {
        let mut choice = match self.kind {
            Kind::Completion => json!({"index": 0, "text": text}),
            Kind::Chat if end.is_some() => json!({"index": 0, "delta": {}}),
            Kind::Chat => json!({"index": 0, "delta": {"content": text}}),
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = finish_reason(end);
        if self.token_ids.is_some() {
            choice["token_ids"] = json!(ids);
        }
        self.chunk(json!([choice]))
    }

    /// The last event, if the client wants the usage.
    pub fn closing(&self, end: &End) -> Option<Value> {
        self.include_usage.then(|| {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage(end);
            chunk["scls"] = scls(end);
            chunk
        })
    }
}
