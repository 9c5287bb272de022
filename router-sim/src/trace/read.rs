//! From bytes to a trace, line by line.

use std::io::{BufRead, BufReader, Read};

use flate2::read::MultiGzDecoder;
use hashbrown::HashMap;
use router_core::{BlockHash, BlockSize, Micros};
use serde::Deserialize;

use super::csv::Columns;
use super::error::{Problem, TraceError};
use super::names::{MOST_BLOCKS, ROOT, link};
use super::{Trace, TraceRequest, jsonl};

/// What a file is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The project's own schema.
    Own,
    /// JSON Lines of kvcache-ai/Mooncake: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens.
    Mooncake,
    /// CSV of Azure/AzurePublicDataset: `TIMESTAMP` (date and time), `ContextTokens`, `GeneratedTokens`; 2023 and later.
    Azure,
    /// CSV of HPMLL/BurstGPT: `Timestamp` in seconds, `Request tokens`, `Response tokens`; `Session ID` and `Log Type` where it
    /// has them. Requests without an answer failed: they are left out and counted.
    BurstGpt,
}

/// What was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The trace.
    pub trace: Trace,
    /// What it was written in.
    pub format: Format,
    /// Requests left out because they failed when they were recorded.
    pub dropped: u64,
}

/// No prompt and no answer is longer, in tokens.
pub(super) const MOST_TOKENS: u64 = 10_000_000;
/// No line is longer, in bytes: ids of 200,000 tokens in blocks of one are 2 MB.
const MOST_LINE: usize = 1 << 26;
/// Requests of a trace.
pub(super) const MOST_REQUESTS: usize = 1 << 27;
/// No time is later, in seconds: 30,000 years.
const MOST_SECONDS: f64 = 1e12;

/// A line of a file, in any format.
#[derive(Debug, Default)]
pub(super) struct Raw<'a> {
    pub(super) at: Micros,
    pub(super) input: (&'static str, u64),
    pub(super) output: (&'static str, u64),
    pub(super) ids: &'a [u64],
    pub(super) runs: &'a [(u64, u64)],
    pub(super) session: Option<&'a str>,
    pub(super) turn: Option<u32>,
    pub(super) class: &'a str,
}

impl Trace {
    /// Reads a trace, gzipped or not, in any known format. `block_size` is for files with blocks that do not say it.
    pub fn read(name: &str, bytes: &[u8], block_size: Option<BlockSize>) -> Result<Reading, TraceError> {
        if bytes.starts_with(&[0x1f, 0x8b]) {
            read_lines(name, BufReader::with_capacity(1 << 16, MultiGzDecoder::new(bytes)), block_size)
        } else {
            read_lines(name, bytes, block_size)
        }
    }
}

/// What a `NAME.meta.json` says of the block size; `None` where the trace has no blocks.
pub fn block_size_in_meta(name: &str, json: &[u8]) -> Result<Option<BlockSize>, TraceError> {
    #[derive(Deserialize)]
    struct Meta {
        block_size: Option<u32>,
    }
    let whole = |problem| TraceError::Whole { name: name.to_owned(), problem };
    let meta: Meta = serde_json::from_slice(json).map_err(|e| whole(Problem::Json(e.to_string())))?;
    meta.block_size.map(|tokens| size(u64::from(tokens))).transpose().map_err(whole)
}

/// A block size that may be.
pub(super) fn size(tokens: u64) -> Result<BlockSize, Problem> {
    let size = u32::try_from(tokens).ok().filter(|_| tokens <= MOST_TOKENS).and_then(BlockSize::new);
    let expected = "a block has from 1 to 10000000 tokens";
    size.ok_or_else(|| Problem::Value { field: "block_size", value: tokens.to_string(), expected })
}

/// Seconds as they stand in a file.
pub(super) fn seconds(field: &'static str, seconds: f64) -> Result<Micros, Problem> {
    if (0.0..=MOST_SECONDS).contains(&seconds) {
        return Ok(Micros((seconds * 1e6).round() as u64));
    }
    let expected = "a time is finite, not negative, and less than 30000 years";
    Err(Problem::Value { field, value: seconds.to_string(), expected })
}

fn read_lines(name: &str, mut lines: impl BufRead, given: Option<BlockSize>) -> Result<Reading, TraceError> {
    let mut reader = Reader { given, ..Reader::default() };
    let mut line = Vec::new();
    let mut number = 0;
    loop {
        number += 1;
        line.clear();
        let step = (&mut lines)
            .take(MOST_LINE as u64 + 1)
            .read_until(b'\n', &mut line)
            .map_err(|e| Problem::Gzip(e.to_string()))
            .and_then(|read| if read == 0 { Ok(false) } else { reader.line(&line).map(|()| true) });
        match step {
            Ok(true) => {}
            Ok(false) => break,
            Err(problem) => return Err(TraceError::Line { name: name.to_owned(), line: number, problem }),
        }
    }
    reader.finish(name).map_err(|problem| TraceError::Whole { name: name.to_owned(), problem })
}

/// What has been read so far.
#[derive(Debug, Default)]
struct Reader {
    given: Option<BlockSize>,
    /// Known from the first line on.
    layout: Option<Layout>,
    trace: Trace,
    /// Chains as they came, one after another.
    chains: Vec<BlockHash>,
    /// By their names.
    sessions: HashMap<String, u32>,
    /// The next turn of each.
    turns: Vec<u32>,
    first: Micros,
    dropped: u64,
}

#[derive(Debug)]
enum Layout {
    Own,
    Mooncake,
    Csv(Columns),
}

impl Reader {
    fn line(&mut self, line: &[u8]) -> Result<(), Problem> {
        if line.len() > MOST_LINE {
            return Err(Problem::Long(MOST_LINE));
        }
        let line = std::str::from_utf8(line).map_err(|_| Problem::Text)?;
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            return Ok(());
        }
        if self.layout.is_none() {
            return self.first_line(line);
        }
        self.request(line)
    }

    fn first_line(&mut self, line: &str) -> Result<(), Problem> {
        if !line.starts_with('{') {
            self.layout = Some(Layout::Csv(Columns::of(line)?));
            return Ok(());
        }
        let (format, header) = jsonl::first(line)?;
        self.trace.block_size = self.given;
        if format == Format::Mooncake {
            self.layout = Some(Layout::Mooncake);
            self.trace.block_size = self.given.or(BlockSize::new(512));
            return self.request(line);
        }
        self.layout = Some(Layout::Own);
        let Some(header) = header else { return self.request(line) };
        if let Some(tokens) = header.block_size {
            let said = size(tokens)?;
            match self.given {
                Some(given) if given != said => {
                    return Err(Problem::BlockSize { given: given.get(), said: said.get() });
                }
                _ => self.trace.block_size = Some(said),
            }
        }
        self.trace.name = header.trace.unwrap_or_default();
        Ok(())
    }

    fn request(&mut self, line: &str) -> Result<(), Problem> {
        match &self.layout {
            Some(Layout::Mooncake) => {
                let line = jsonl::mooncake(line)?;
                self.put("timestamp", line.raw()?)
            }
            Some(Layout::Csv(columns)) => {
                let time = columns.time();
                let row = columns.row(line)?;
                self.dropped += u64::from(row.is_none());
                row.map_or(Ok(()), |row| self.put(time, row))
            }
            Some(Layout::Own) | None => {
                let line = jsonl::own(line)?;
                self.put("arrival_s", line.raw()?)
            }
        }
    }

    fn put(&mut self, time: &'static str, raw: Raw<'_>) -> Result<(), Problem> {
        let [input, output] = [raw.input, raw.output].map(|(field, tokens)| match u32::try_from(tokens) {
            Ok(count) if (1..=MOST_TOKENS).contains(&tokens) => Ok(count),
            _ => {
                let expected = "a request has from 1 to 10000000 tokens each way; leave it out if it failed";
                Err(Problem::Value { field, value: tokens.to_string(), expected })
            }
        });
        let (input, output) = (input?, output?);
        if self.trace.requests.is_empty() {
            self.first = raw.at;
        }
        let Some(at) = raw.at.checked_sub(self.first) else { return Err(self.unsorted(time, raw.at)) };
        if self.trace.requests.last().is_some_and(|last| last.at > at) {
            return Err(self.unsorted(time, raw.at));
        }
        if self.trace.requests.len() >= MOST_REQUESTS {
            return Err(Problem::Most("134 million requests"));
        }
        let chain = self.chain(input, raw.ids, raw.runs)?;
        let session = raw.session.map(|name| self.session(name));
        let turn = match (session, raw.turn) {
            (Some(session), turn) => {
                let next = &mut self.turns[session as usize];
                let turn = turn.unwrap_or(*next);
                *next = turn.saturating_add(1);
                turn
            }
            (None, turn) => turn.unwrap_or(0),
        };
        let class = self.trace.class(raw.class).ok_or(Problem::Most("65536 classes"))?;
        self.trace.requests.push(TraceRequest { at, input, output, chain, session, turn, class });
        Ok(())
    }

    fn unsorted(&self, field: &'static str, at: Micros) -> Problem {
        let last = self.first + self.trace.requests.last().map_or(Micros::ZERO, |last| last.at);
        let [this, last] = [at, last].map(|time| time.0 as f64 * 1e-6);
        Problem::Unsorted { field, this, last }
    }

    fn session(&mut self, name: &str) -> u32 {
        if let Some(session) = self.sessions.get(name) {
            return *session;
        }
        // no more than requests
        let session = self.turns.len() as u32;
        self.turns.push(0);
        self.sessions.insert(name.to_owned(), session);
        session
    }

    /// Names of the whole blocks, as they are read.
    fn chain(&mut self, input: u32, ids: &[u64], runs: &[(u64, u64)]) -> Result<(u32, u32), Problem> {
        let blocks = runs.iter().fold(ids.len() as u64, |sum, (_, count)| sum.saturating_add(*count));
        if blocks == 0 {
            return Ok((0, 0));
        }
        let size = self.trace.block_size.ok_or(Problem::NoBlockSize)?.get();
        let (input, whole) = (u64::from(input), u64::from(input) / size);
        let expected = input.div_ceil(size);
        // one of the two lists is empty
        if blocks != expected {
            return Err(Problem::Blocks { blocks, input, expected, size });
        }
        let start = self.chains.len();
        if start + whole as usize > MOST_BLOCKS {
            return Err(Problem::Most("500 million blocks"));
        }
        let in_runs = runs.iter().flat_map(|(first, count)| (0..*count).map(|at| first.wrapping_add(at)));
        let mut name = ROOT;
        self.chains.extend(ids.iter().copied().chain(in_runs).take(whole as usize).map(|id| {
            name = link(name, id);
            name
        }));
        Ok((start as u32, whole as u32))
    }

    fn finish(self, name: &str) -> Result<Reading, Problem> {
        let Self { layout, mut trace, chains, dropped, .. } = self;
        if trace.requests.is_empty() {
            return Err(Problem::Empty);
        }
        let format = match layout {
            Some(Layout::Mooncake) => Format::Mooncake,
            Some(Layout::Csv(columns)) => columns.format(),
            Some(Layout::Own) | None => Format::Own,
        };
        trace.store(&chains).ok_or(Problem::Most("500 million blocks"))?;
        if trace.name.is_empty() {
            name.clone_into(&mut trace.name);
        }
        Ok(Reading { trace, format, dropped })
    }
}
