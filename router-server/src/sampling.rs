//! The values of `Sampling` and `Limits` that mean something, asked by everyone who takes them: both doors of the
//! router, and the mock worker. HTTP is narrower in some, as OpenAI is; see `fields.rs`.

use crate::error::Error;
use crate::proto::{Limits, Sampling};

/// Most of the likeliest ids that come with a token's logprob.
pub const MOST_LOGPROBS: u32 = 20;
/// Most biased ids, and most ids that end a row.
pub const MOST_IDS: usize = 1024;

/// Most stop strings, and most bytes of one.
const MOST_STOPS: (usize, usize) = (16, 1024);

/// Stop strings are the router's alone: a worker is not told of them.
pub fn check_stops(stops: &[String]) -> Result<(), Error> {
    let (most, longest) = MOST_STOPS;
    if stops.len() > most {
        return Err(Error::invalid("stop", format!("more than {most} stop strings: {}", stops.len())));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > longest) {
        Some(stop) => Err(Error::invalid("stop", format!("a stop string has 1 to {longest} bytes: {}", stop.len()))),
        None => Ok(()),
    }
}

/// The first field out of range, and what is wrong with it. `max_tokens` 0 is no limit.
pub fn fault(sampling: &Sampling, limits: &Limits, vocab: u32) -> Option<(&'static str, String)> {
    type Right = fn(f32) -> bool;
    let numbers: [(_, _, Right, _); 6] = [
        ("temperature", Some(sampling.temperature), |value| value >= 0.0, "at least 0"),
        ("top_p", sampling.top_p, |value| value > 0.0 && value <= 1.0, "above 0 and at most 1"),
        ("min_p", sampling.min_p, |value| (0.0..=1.0).contains(&value), "from 0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty, |value| value > 0.0, "above 0"),
        ("presence_penalty", sampling.presence_penalty, |_| true, "finite"),
        ("frequency_penalty", sampling.frequency_penalty, |_| true, "finite"),
    ];
    for (name, value, right, wanted) in numbers {
        if let Some(value) = value.filter(|value| !(value.is_finite() && right(*value))) {
            return Some((name, format!("{name} must be {wanted}: {value}")));
        }
    }
    let bias = &sampling.logit_bias;
    if bias.len() > MOST_IDS {
        return Some(("logit_bias", format!("logit_bias has at most {MOST_IDS} ids: {}", bias.len())));
    }
    if let Some((id, bias)) = bias.iter().find(|(id, bias)| **id >= vocab || !bias.is_finite()) {
        let message =
            if *id >= vocab { no_such_id(*id, vocab) } else { format!("the bias of {id} must be finite: {bias}") };
        return Some(("logit_bias", message));
    }
    if let Some(asked) = sampling.logprobs.filter(|asked| *asked > MOST_LOGPROBS) {
        return Some(("logprobs", format!("logprobs must be from 0 to {MOST_LOGPROBS}: {asked}")));
    }
    if limits.stop_token_ids.len() > MOST_IDS {
        let message = format!("at most {MOST_IDS} stop token ids: {}", limits.stop_token_ids.len());
        return Some(("stop_token_ids", message));
    }
    if let Some(id) = limits.stop_token_ids.iter().find(|id| **id >= vocab) {
        return Some(("stop_token_ids", no_such_id(*id, vocab)));
    }
    let most = limits.max_tokens;
    (most > 0 && limits.min_tokens > most)
        .then(|| ("min_tokens", format!("more than the limit of {most} tokens: {}", limits.min_tokens)))
}

/// What is said of an id outside the vocabulary.
pub fn no_such_id(id: u32, vocab: u32) -> String {
    format!("a token id that does not exist: {id}\nids are below {vocab}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_fault(sampling: Sampling) -> Option<&'static str> {
        fault(&sampling, &Limits::default(), 100).map(|(name, _)| name)
    }

    #[test]
    fn borders_are_where_the_contract_has_them() {
        let float = |name: &str, value: f32| {
            let mut sampling = Sampling::default();
            match name {
                "temperature" => sampling.temperature = value,
                "top_p" => sampling.top_p = Some(value),
                "min_p" => sampling.min_p = Some(value),
                "repetition_penalty" => sampling.repetition_penalty = Some(value),
                "presence_penalty" => sampling.presence_penalty = Some(value),
                "frequency_penalty" => sampling.frequency_penalty = Some(value),
                _ => sampling.logit_bias = [(5, value)].into(),
            }
            at_fault(sampling)
        };
        let table: [(&str, &[f32], &[f32]); 7] = [
            ("temperature", &[0.0, 1e-6, 50.0], &[-0.1]),
            ("top_p", &[1e-6, 1.0], &[0.0, 1.0001, -1.0]),
            ("min_p", &[0.0, 1.0], &[-0.001, 1.001]),
            ("repetition_penalty", &[1e-3, 9.0], &[0.0, -1.0]),
            ("presence_penalty", &[-50.0, 50.0], &[]),
            ("frequency_penalty", &[-50.0, 50.0], &[]),
            ("logit_bias", &[-1e6, 1e6], &[]),
        ];
        for (name, right, wrong) in table {
            for value in right {
                assert_eq!(float(name, *value), None, "{name} {value}");
            }
            for value in wrong.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
                assert_eq!(float(name, *value), Some(name), "{name} {value}");
            }
        }
        assert_eq!(at_fault(Sampling { logprobs: Some(20), ..Sampling::default() }), None);
        assert_eq!(at_fault(Sampling { logprobs: Some(21), ..Sampling::default() }), Some("logprobs"));
        assert_eq!(at_fault(Sampling { logit_bias: [(100, 1.0)].into(), ..Sampling::default() }), Some("logit_bias"));
        let many = (0..1025).map(|id| (id % 1200, 1.0)).collect();
        let many = fault(&Sampling { logit_bias: many, ..Sampling::default() }, &Limits::default(), 2000);
        assert_eq!(many.map(|(name, _)| name), Some("logit_bias"));
    }

    #[test]
    fn limits_agree_with_each_other() {
        let limits = |max_tokens, min_tokens, stop: &[u32]| {
            let limits = Limits { max_tokens, min_tokens, stop_token_ids: stop.to_vec(), ignore_eos: false };
            fault(&Sampling::default(), &limits, 100).map(|(name, _)| name)
        };
        assert_eq!(limits(5, 5, &[99]), None);
        assert_eq!(limits(0, 5, &[]), None);
        assert_eq!(limits(5, 6, &[]), Some("min_tokens"));
        assert_eq!(limits(5, 0, &[100]), Some("stop_token_ids"));
        assert_eq!(limits(5, 0, &[1; 1025]), Some("stop_token_ids"));
    }
}
