//! Lines of JSON: the project's own schema, and Mooncake's.

use std::borrow::Cow;

use serde::Deserialize;

use super::error::Problem;
use super::read::{Format, Raw, seconds};

/// The first line of a file of the own schema, where it is no request.
#[derive(Debug, Deserialize)]
pub(super) struct Header {
    pub(super) trace: Option<String>,
    pub(super) block_size: Option<u64>,
}

/// A line of the own schema.
#[derive(Debug, Deserialize)]
pub(super) struct Own<'a> {
    arrival_s: f64,
    input_tokens: u64,
    output_tokens: u64,
    block_hashes: Option<Vec<u64>>,
    block_runs: Option<Vec<(u64, u64)>>,
    #[serde(borrow)]
    session: Option<Cow<'a, str>>,
    turn: Option<u32>,
    #[serde(borrow)]
    class: Option<Cow<'a, str>>,
}

/// A line of Mooncake's.
#[derive(Debug, Deserialize)]
pub(super) struct Mooncake {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Option<Vec<u64>>,
}

/// What the first line says of the file; the header, if it is one.
pub(super) fn first(line: &str) -> Result<(Format, Option<Header>), Problem> {
    let keys: serde_json::Map<String, serde_json::Value> = parse(line)?;
    let has = |names: &[&str]| names.iter().any(|name| keys.contains_key(*name));
    if has(&["arrival_s", "input_tokens", "output_tokens"]) {
        return Ok((Format::Own, None));
    }
    if has(&["timestamp", "input_length", "output_length", "hash_ids"]) {
        return Ok((Format::Mooncake, None));
    }
    if has(&["block_size", "trace"]) {
        return Ok((Format::Own, Some(parse(line)?)));
    }
    Err(Problem::Format)
}

pub(super) fn own(line: &str) -> Result<Own<'_>, Problem> {
    parse(line)
}

pub(super) fn mooncake(line: &str) -> Result<Mooncake, Problem> {
    parse(line)
}

impl Own<'_> {
    pub(super) fn raw(&self) -> Result<Raw<'_>, Problem> {
        let [ids, runs] = [self.block_hashes.is_some(), self.block_runs.is_some()];
        if ids && runs {
            return Err(Problem::Json("a request has block_hashes or block_runs, not both".to_owned()));
        }
        Ok(Raw {
            at: seconds("arrival_s", self.arrival_s)?,
            input: ("input_tokens", self.input_tokens),
            output: ("output_tokens", self.output_tokens),
            ids: self.block_hashes.as_deref().unwrap_or_default(),
            runs: self.block_runs.as_deref().unwrap_or_default(),
            session: self.session.as_deref(),
            turn: self.turn,
            class: self.class.as_deref().unwrap_or("all"),
        })
    }
}

impl Mooncake {
    pub(super) fn raw(&self) -> Result<Raw<'_>, Problem> {
        Ok(Raw {
            at: seconds("timestamp", self.timestamp * 1e-3)?,
            input: ("input_length", self.input_length),
            output: ("output_length", self.output_length),
            ids: self.hash_ids.as_deref().unwrap_or_default(),
            class: "mooncake",
            ..Raw::default()
        })
    }
}

fn parse<'a, T: Deserialize<'a>>(line: &'a str) -> Result<T, Problem> {
    // its own "line" is always 1
    serde_json::from_str(line).map_err(|e| Problem::Json(e.to_string().replace(" at line 1 column ", " at column ")))
}
