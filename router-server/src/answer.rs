//! OpenAI's answers: bodies and events.

use std::sync::Arc;

use router_core::TokenLogprobs;
use serde_json::{Map, Value, json};

use crate::generation::{End, Finish};
use crate::output::{Given, Token};
use crate::pieces::Pieces;

/// What stands for minus infinity, as at OpenAI: JSON has no word for it.
const LEAST_LOGPROB: f32 = -9999.0;

/// Which of the two endpoints answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

/// What all parts of one answer have in common.
#[derive(Clone)]
pub struct Answer {
    /// The endpoint.
    pub kind: Kind,
    /// The answer's id.
    pub id: String,
    /// The model's name as it was asked for.
    pub model: String,
    /// Of the model's weights.
    pub fingerprint: String,
    /// Unix seconds.
    pub created: u64,
    /// Choices.
    pub n: u32,
    /// The client wants `"usage": null` in all events but the last.
    pub include_usage: bool,
    /// The client wants ids: those of the prompt.
    pub token_ids: Option<Arc<[u32]>>,
    /// The client wants logprobs: how tokens read.
    pub logprobs: Option<Pieces>,
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
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

/// A logprob as JSON can say it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LEAST_LOGPROB } else { logprob.clamp(LEAST_LOGPROB, 0.0) }
}

/// `content` of a chat: the token, its bytes, and the likeliest beside it.
fn chat_logprobs(pieces: &Pieces, tokens: &[Token]) -> Value {
    let entry = |id: u32, logprob: f32| {
        let (token, bytes) = pieces.token(id);
        json!({"token": token, "logprob": finite(logprob), "bytes": bytes})
    };
    let of_token = |token: &Token| {
        let TokenLogprobs { chosen, top } = token.logprobs.as_ref()?;
        let mut content = entry(token.id, *chosen);
        content["top_logprobs"] = top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
        Some(content)
    };
    json!({"content": tokens.iter().filter_map(of_token).collect::<Value>(), "refusal": null})
}

/// The four lists of a completion. The drawn token is among its likeliest, as at OpenAI, even where it is not.
fn completion_logprobs(pieces: &Pieces, tokens: &[Token]) -> Value {
    let (mut texts, mut chosens, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for token in tokens {
        let Some(TokenLogprobs { chosen, top }) = &token.logprobs else { continue };
        let mut rivals = Map::new();
        for (id, logprob) in top.iter().chain(&[(token.id, *chosen)]) {
            // Of two that read alike the likelier stays.
            rivals.entry(legacy(pieces, *id)).or_insert_with(|| json!(finite(*logprob)));
        }
        texts.push(legacy(pieces, token.id));
        chosens.push(finite(*chosen));
        tops.push(rivals);
        offsets.push(token.offset);
    }
    json!({"tokens": texts, "token_logprobs": chosens, "top_logprobs": tops, "text_offset": offsets})
}

/// A token as OpenAI's completions write it: with a word before bytes that are no text.
fn legacy(pieces: &Pieces, id: u32) -> String {
    let is_text = pieces.bytes(id).is_none_or(|bytes| std::str::from_utf8(&bytes).is_ok());
    let (token, _) = pieces.token(id);
    if is_text { token } else { format!("bytes:{token}") }
}

impl Answer {
    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
               "system_fingerprint": self.fingerprint, "choices": choices})
    }

    /// Adds what a choice has beside its text.
    fn complete(&self, choice: &mut Value, tokens: &[Token], finish: Option<Finish>) {
        choice["logprobs"] = match (&self.logprobs, self.kind) {
            (Some(pieces), Kind::Chat) => chat_logprobs(pieces, tokens),
            (Some(pieces), Kind::Completion) => completion_logprobs(pieces, tokens),
            (None, _) => Value::Null,
        };
        choice["finish_reason"] = finish.map(finish_reason).into();
        if self.token_ids.is_some() {
            choice["token_ids"] = tokens.iter().map(|token| token.id).collect();
        }
    }

    /// The whole answer at once: every choice in order.
    pub fn whole(&self, choices: &[(Given, Finish)], end: &End) -> Value {
        let choice = |(index, (given, finish)): (usize, &(Given, Finish))| {
            let mut choice = match self.kind {
                Kind::Completion => json!({"index": index, "text": given.text}),
                Kind::Chat => {
                    json!({"index": index, "message": {"role": "assistant", "content": given.text, "refusal": null}})
                }
            };
            self.complete(&mut choice, &given.tokens, Some(*finish));
            choice
        };
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        let mut answer = self.envelope(object, choices.iter().enumerate().map(choice).collect());
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

    /// The first events of a chat's stream: whose messages they are.
    pub fn openings(&self) -> Vec<Value> {
        let choices = if self.kind == Kind::Chat { self.n } else { 0 };
        let opening = |index: u32| {
            let delta = json!({"role": "assistant", "content": ""});
            let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            let mut chunk = self.chunk(json!([choice]));
            if index == 0 {
                self.add_prompt_ids(&mut chunk);
            }
            chunk
        };
        (0..choices).map(opening).collect()
    }

    /// Where vLLM has them: beside the choices of a chat.
    fn add_prompt_ids(&self, answer: &mut Value) {
        if let Some(ids) = self.token_ids.as_ref().filter(|_| self.kind == Kind::Chat) {
            answer["prompt_token_ids"] = json!(**ids);
        }
    }

    /// Whether tokens show in the answer beside their text.
    pub fn shows_tokens(&self) -> bool {
        self.token_ids.is_some() || self.logprobs.is_some()
    }

    /// An event with text and tokens of a choice; or with the reason of its end, without either.
    pub fn event(&self, index: u32, text: &str, tokens: &[Token], finish: Option<Finish>) -> Value {
        let mut choice = match self.kind {
            Kind::Completion => json!({"index": index, "text": text}),
            Kind::Chat if finish.is_some() => json!({"index": index, "delta": {}}),
            Kind::Chat => json!({"index": index, "delta": {"content": text}}),
        };
        self.complete(&mut choice, tokens, finish);
        if finish.is_some() {
            choice["logprobs"] = Value::Null;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::bytes_tokenizer;

    fn answer(kind: Kind) -> Answer {
        Answer {
            kind,
            id: "x".into(),
            model: "tiny".into(),
            fingerprint: "fp_0".into(),
            created: 0,
            n: 1,
            include_usage: false,
            token_ids: None,
            logprobs: Some(Pieces::new(Some(bytes_tokenizer()))),
        }
    }

    #[test]
    fn logprobs_are_numbers_whatever_the_model_says() {
        let tokenizer = bytes_tokenizer();
        let a = tokenizer.encode("a", false).expect("ids")[0];
        let half = tokenizer.encode("é", false).expect("ids")[0];
        let logprobs = TokenLogprobs { chosen: f32::NEG_INFINITY, top: vec![(half, f32::NAN), (a, -0.5)] };
        let token = Token { id: a, offset: 3, logprobs: Some(logprobs) };
        let chat = answer(Kind::Chat).event(0, "a", std::slice::from_ref(&token), None);
        let content = &chat["choices"][0]["logprobs"]["content"][0];
        assert_eq!((&content["token"], &content["logprob"]), (&json!("a"), &json!(-9999.0)));
        assert_eq!(content["top_logprobs"][0], json!({"token": r"\xc3", "logprob": -9999.0, "bytes": [0xc3]}));
        let completion = answer(Kind::Completion).event(0, "a", std::slice::from_ref(&token), None);
        let wanted = json!({"tokens": ["a"], "token_logprobs": [-9999.0], "text_offset": [3],
                            "top_logprobs": [{r"bytes:\xc3": -9999.0, "a": -0.5}]});
        assert_eq!(completion["choices"][0]["logprobs"], wanted);
    }
}
