//! Reads the fields of a body one by one, each with its range, and refuses what is left over.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::proto::Sampling;
use crate::request::Params;
use crate::sampling::{MOST_IDS, MOST_LOGPROBS, check_stops};

/// Most answers to one request.
pub(crate) const MOST_CHOICES: u32 = 128;

/// The fields of a body, taken one by one; what is left over at the end was not expected.
pub(crate) struct Fields(pub(crate) Map<String, Value>);

impl Fields {
    /// A field's value; `null` is absence.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "a string", &other)),
        }
    }

    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, Error> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(wrong(name, "a boolean", &other)),
        }
    }

    pub(crate) fn count(&mut self, name: &str, least: u32) -> Result<Option<u32>, Error> {
        self.at_most(name, least, u32::MAX)
    }

    /// A count up to `most`.
    fn at_most(&mut self, name: &str, least: u32, most: u32) -> Result<Option<u32>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Value::Number(number) = &value else {
            return Err(wrong(name, "an integer", &value));
        };
        match number.as_u64().and_then(|count| u32::try_from(count).ok()) {
            Some(count) if (least..=most).contains(&count) => Ok(Some(count)),
            _ => Err(Error::invalid(name, format!("{name} must be an integer from {least} to {most}: {number}"))),
        }
    }

    /// A number; ranges with an open end are asked later, by [`crate::sampling::fault`].
    fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Some(number) = value.as_f64() else {
            return Err(wrong(name, "a number", &value));
        };
        // As it was written: rounded to f32, what lies just outside could fall on the border.
        if (f64::from(*range.start())..=f64::from(*range.end())).contains(&number) {
            return Ok(Some(number as f32));
        }
        let (least, most) = (range.start(), range.end());
        Err(Error::invalid(name, format!("{name} must be between {least} and {most}: {number}")))
    }

    /// 0 and -1 are off.
    fn top_k(&mut self) -> Result<u32, Error> {
        if self.0.get("top_k").and_then(Value::as_i64) == Some(-1) {
            self.0.shift_remove("top_k");
        }
        Ok(self.count("top_k", 0)?.unwrap_or(0))
    }

    fn logit_bias(&mut self) -> Result<HashMap<u32, f32>, Error> {
        const NAME: &str = "logit_bias";
        let biases = match self.take(NAME) {
            None => return Ok(HashMap::new()),
            Some(Value::Object(biases)) => biases,
            Some(other) => return Err(wrong(NAME, "an object of token ids and their biases", &other)),
        };
        if biases.len() > MOST_IDS {
            return Err(Error::invalid(NAME, format!("logit_bias has at most {MOST_IDS} ids: {}", biases.len())));
        }
        let bias = |(id, bias): (String, Value)| {
            let digits = id.bytes().all(|byte| byte.is_ascii_digit());
            let Some(number) = id.parse::<u32>().ok().filter(|_| digits) else {
                let id: String = id.chars().take(64).collect();
                return Err(Error::invalid(NAME, format!("logit_bias has token ids as its keys: {id}")));
            };
            match bias.as_f64() {
                Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((number, bias as f32)),
                Some(bias) => {
                    Err(Error::invalid(NAME, format!("the bias of {id} must be between -100 and 100: {bias}")))
                }
                None => Err(wrong(NAME, "an object of token ids and their biases", &bias)),
            }
        };
        biases.into_iter().map(bias).collect()
    }

    /// Of a completion: how many of the likeliest tokens.
    pub(crate) fn logprobs_count(&mut self) -> Result<Option<u32>, Error> {
        self.at_most("logprobs", 0, MOST_LOGPROBS)
    }

    /// Of a chat: whether, and how many.
    pub(crate) fn logprobs_flag(&mut self) -> Result<Option<u32>, Error> {
        let wanted = self.flag("logprobs")?;
        let top = self.at_most("top_logprobs", 0, MOST_LOGPROBS)?.unwrap_or(0);
        if top > 0 && !wanted {
            return Err(Error::invalid("top_logprobs", "top_logprobs needs logprobs: true"));
        }
        Ok(wanted.then_some(top))
    }

    pub(crate) fn seed(&mut self) -> Result<Option<u64>, Error> {
        let Some(value) = self.take("seed") else { return Ok(None) };
        // Negative seeds are as good as others.
        let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        seed.map(Some).ok_or_else(|| wrong("seed", "an integer of 64 bits", &value))
    }

    pub(crate) fn stop(&mut self) -> Result<Vec<String>, Error> {
        let stops = match self.take("stop") {
            None => return Ok(Vec::new()),
            Some(Value::String(stop)) => vec![stop],
            Some(Value::Array(stops)) => {
                let text = |stop| match stop {
                    Value::String(text) => Ok(text),
                    other => Err(wrong("stop", "a list of strings", &other)),
                };
                stops.into_iter().map(text).collect::<Result<_, _>>()?
            }
            Some(other) => return Err(wrong("stop", "a string or a list of strings", &other)),
        };
        check_stops(&stops)?;
        Ok(stops)
    }

    pub(crate) fn stop_token_ids(&mut self) -> Result<Vec<u32>, Error> {
        let ids = match self.take("stop_token_ids") {
            None => return Ok(Vec::new()),
            Some(Value::Array(ids)) if ids.len() <= MOST_IDS => ids,
            Some(other) => {
                return Err(wrong("stop_token_ids", &format!("a list of at most {MOST_IDS} token ids"), &other));
            }
        };
        let id = |id: Value| {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            number.ok_or_else(|| wrong("stop_token_ids", "a list of token ids", &id))
        };
        ids.into_iter().map(id).collect()
    }

    pub(crate) fn include_usage(&mut self, stream: bool) -> Result<bool, Error> {
        let options = match self.take("stream_options") {
            None => return Ok(false),
            Some(Value::Object(_)) if !stream => {
                return Err(Error::invalid("stream_options", "stream_options needs stream: true"));
            }
            Some(Value::Object(options)) => options,
            Some(other) => return Err(wrong("stream_options", "an object", &other)),
        };
        let mut options = Self(options);
        let include = options.flag("include_usage")?;
        // It pads events to hide their lengths; to be without it is the answer of most servers.
        let _ = options.flag("include_obfuscation")?;
        match options.0.into_iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(Error::unsupported(format!("stream_options.{name}"))),
            None => Ok(include),
        }
    }

    pub(crate) fn params(&mut self, logprobs: Option<u32>) -> Result<Params, Error> {
        let max_tokens = self.count("max_tokens", 1)?;
        let max_completion_tokens = self.count("max_completion_tokens", 1)?;
        let stream = self.flag("stream")?;
        Ok(Params {
            // The new name wins where both are given, as at OpenAI.
            max_tokens: max_completion_tokens.or(max_tokens),
            limit_name: if max_completion_tokens.is_some() { "max_completion_tokens" } else { "max_tokens" },
            min_tokens: self.count("min_tokens", 0)?.unwrap_or(0),
            n: self.at_most("n", 1, MOST_CHOICES)?.unwrap_or(1),
            sampling: Sampling {
                temperature: self.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
                top_k: self.top_k()?,
                top_p: self.number("top_p", 0.0..=1.0)?,
                min_p: self.number("min_p", 0.0..=1.0)?,
                repetition_penalty: self.number("repetition_penalty", 0.0..=f32::MAX)?,
                presence_penalty: self.number("presence_penalty", -2.0..=2.0)?,
                frequency_penalty: self.number("frequency_penalty", -2.0..=2.0)?,
                seed: 0,
                logit_bias: self.logit_bias()?,
                logprobs,
            },
            seed: self.seed()?,
            stop: self.stop()?,
            stop_token_ids: self.stop_token_ids()?,
            ignore_eos: self.flag("ignore_eos")?,
            include_usage: self.include_usage(stream)?,
            stream,
            return_token_ids: self.flag("return_token_ids")?,
            urgent: self.priority()?,
        })
    }

    /// OpenAI's tiers: only the one that is served sooner than others is more than the default.
    fn priority(&mut self) -> Result<bool, Error> {
        const NAME: &str = "service_tier";
        match self.string(NAME)?.as_deref() {
            None | Some("auto" | "default" | "flex") => Ok(false),
            Some("priority") => Ok(true),
            Some(_) => Err(Error::unsupported(NAME)),
        }
    }

    pub(crate) fn model(&mut self) -> Result<String, Error> {
        let model = self.string("model")?.ok_or_else(|| Error::invalid("model", "the model is missing"))?;
        if model.is_empty() { Err(Error::invalid("model", "the model's name is empty")) } else { Ok(model) }
    }

    /// Refuses what is left over, unless it says what would be done without it.
    pub(crate) fn nothing_else(self, n: u32) -> Result<(), Error> {
        for (name, value) in self.0 {
            if !value.is_null() && !is_neutral(&name, &value, n) {
                return Err(Error::unsupported(name));
            }
        }
        Ok(())
    }
}

/// Fields that are read.
const SERVED: [&str; 26] = [
    "model",
    "messages",
    "tools",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "stream",
    "stream_options",
    "return_token_ids",
    "add_special_tokens",
    "tool_choice",
    "service_tier",
];
/// Fields that are not served, but have a value that asks for nothing; see [`is_neutral`].
const WITH_NEUTRAL: [&str; 24] = [
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "metadata",
    "best_of",
    "length_penalty",
    "top_logprobs",
    "priority",
    "chat_template_kwargs",
    "scls",
    "echo",
    "store",
    "use_beam_search",
    "include_stop_str_in_output",
    "early_stopping",
    "continue_final_message",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "add_generation_prompt",
    "detokenize",
    "parallel_tool_calls",
    "suffix",
    "response_format",
    "modalities",
];

/// All fields that are read or have a value that asks for nothing.
#[cfg(test)]
pub(crate) fn known() -> impl Iterator<Item = &'static str> {
    SERVED.into_iter().chain(WITH_NEUTRAL)
}

/// Whether a field's value matters.
pub(crate) fn is_known(name: &str) -> bool {
    SERVED.contains(&name) || WITH_NEUTRAL.contains(&name)
}

/// Whether a field that is not served asks for nothing that is not done anyway.
fn is_neutral(name: &str, value: &Value, n: u32) -> bool {
    let number = |neutral: &[f64]| value.as_f64().is_some_and(|value| neutral.contains(&value));
    match name {
        // Who asks, and for what, does not change the answer.
        "user" | "safety_identifier" | "prompt_cache_key" => value.is_string(),
        "metadata" => value.is_object(),
        // The best n of n are all of them.
        "best_of" => number(&[f64::from(n)]),
        "length_penalty" => number(&[1.0]),
        "top_logprobs" | "priority" => number(&[0.0]),
        "chat_template_kwargs" | "scls" => value.as_object().is_some_and(Map::is_empty),
        "echo"
        | "store"
        | "use_beam_search"
        | "include_stop_str_in_output"
        | "early_stopping"
        | "continue_final_message" => value == &json!(false),
        "skip_special_tokens"
        | "spaces_between_special_tokens"
        | "add_generation_prompt"
        | "detokenize"
        | "parallel_tool_calls" => value == &json!(true),
        "suffix" => value == &json!(""),
        "response_format" => value == &json!({"type": "text"}),
        "modalities" => value == &json!(["text"]),
        // Tool calls are the model's text, not parsed: with tools the model decides. "none" was taken before.
        "tool_choice" => value == &json!("auto"),
        _ => false,
    }
}

pub(crate) fn wrong(name: &str, want: &str, got: &Value) -> Error {
    Error::invalid(name, format!("{name} must be {want}: {}", kind_of(got)))
}

/// What a value is, for messages.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
