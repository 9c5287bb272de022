//! A real fleet's run as `bench/record_run.py` writes it: what was asked, what happened, what each batch computed and took.
//!
//! Prompts are not in it. Of each it says which earlier request it goes on from, how many tokens they share and how many are
//! new: that is all that caches see of a prompt, and it may be given away.

use std::io::Read;

use router_core::{BatchEnd, CostModel, Layout, Mode, PolicyName};
use serde::Deserialize;

/// The name of the form that is read.
const FORMAT: &str = "scls-router run 1";
/// Most bytes of a recording, unpacked: a thousand times what the fixtures have.
const MOST_BYTES: u64 = 1 << 30;
/// Most tokens of all prompts and answers of a run together.
const MOST_TOKENS: u64 = 1 << 28;

/// A workload that a fleet has served, some times over.
#[derive(Clone, Debug, Deserialize)]
pub struct RecordedRun {
    format: String,
    /// The workload.
    pub name: String,
    /// When it was recorded.
    pub when: String,
    /// Where.
    pub machine: Machine,
    /// How rows became batches.
    pub scheduler: String,
    /// How workers were chosen.
    pub policy: String,
    /// One run more, which is compared with nothing: what iterations cost among the fleet's other processes is fitted to its
    /// batches. Without it they cost what the workers announced.
    #[serde(default)]
    pub calibration: Option<OneRun>,
    /// Each on a fresh fleet.
    pub runs: Vec<OneRun>,
}

/// The machine that all of it ran on: workers, router and clients.
#[derive(Clone, Debug, Deserialize)]
pub struct Machine {
    /// Its processor.
    pub cpu: String,
    /// How many of them.
    pub cores: u32,
}

/// The workload once.
#[derive(Clone, Debug, Deserialize)]
pub struct OneRun {
    /// The machine's load average before.
    pub load_before: f64,
    /// The share of its cores that something else was using just before.
    pub busy_before: f64,
    /// In the order in which others name them.
    pub workers: Vec<RecordedWorker>,
    /// Of requests of one token on an idle fleet: time to the token, and the time of the iteration in it, in microseconds.
    pub probes_us: Vec<[u64; 2]>,
    /// In order of arrival.
    pub requests: Vec<RecordedRequest>,
    /// In order of their start.
    pub batches: Vec<RecordedBatch>,
}

/// What a worker announced.
#[derive(Clone, Debug, Deserialize)]
pub struct RecordedWorker {
    /// Its name.
    pub id: String,
    /// Tokens a block.
    pub block_size: u64,
    /// KV blocks.
    pub blocks: u64,
    /// Most rows of a batch.
    pub max_rows: u32,
    /// Most tokens of prompt and output together.
    pub max_context: u64,
    /// Most prefill tokens of an iteration.
    pub chunk_tokens: u32,
    /// Ids below this one exist.
    pub vocab: u32,
    /// What work costs on it.
    pub cost_model: CostModel,
}

/// A request and its answer; times in microseconds from the run's start, by the client's clock.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct RecordedRequest {
    /// The earlier request whose prompt and answer this prompt begins like, by its place.
    pub parent: Option<usize>,
    /// So many tokens of these.
    pub keep: usize,
    /// So many tokens follow, which no earlier prompt has there.
    pub new: usize,
    /// Its conversation; of probes -1.
    pub session: i64,
    /// Its place in it.
    pub turn: u32,
    /// Most output tokens, as announced.
    pub limit: u32,
    /// Output tokens.
    pub output: u32,
    /// It ended by itself, not at its limit.
    pub stopped: bool,
    /// When it was sent.
    pub arrived_us: u64,
    /// When its first token came.
    pub first_us: u64,
    /// When its last token came.
    pub ended_us: u64,
    /// Prompt tokens found cached.
    pub cached: u64,
}

/// A batch, by the router's and the worker's clock.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct RecordedBatch {
    /// Its worker's place.
    pub worker: usize,
    /// When the router learned that it started.
    pub at_us: u64,
    /// Rows at its start.
    pub rows: u64,
    /// Why it ended.
    pub end: RecordedEnd,
    /// Iterations that ran.
    pub steps: u32,
    /// Their time, as the worker measured it.
    pub time_us: u64,
    /// See [`router_core::Work`].
    pub fills: u32,
    /// See [`router_core::Work`].
    pub prefill_tokens: u64,
    /// See [`router_core::Work`].
    pub pairs: u64,
    /// See [`router_core::Work`].
    pub decoded_tokens: u64,
    /// See [`router_core::Work`].
    pub context_tokens: u64,
    /// See [`router_core::Work`].
    pub longest_tokens: u64,
}

/// [`BatchEnd`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordedEnd {
    /// All steps ran.
    Steps,
    /// No row was left.
    AllDone,
    /// The router cut it.
    Cut,
    /// The worker could not send.
    Backpressure,
    /// The engine failed.
    Error,
}

/// What is no recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// It cannot be unpacked.
    #[error("it cannot be unpacked: {0}\nrecord it again with `make record-runs`")]
    Packed(String),
    /// It does not parse.
    #[error("{path}: {reason}\na recording is a file that `make record-runs` wrote")]
    Field {
        /// The field, as `runs[0].workers[1].blocks`.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It says something that cannot have been.
    #[error("{0}")]
    Impossible(String),
}

impl From<RecordedEnd> for BatchEnd {
    fn from(end: RecordedEnd) -> Self {
        match end {
            RecordedEnd::Steps => Self::Steps,
            RecordedEnd::AllDone => Self::AllDone,
            RecordedEnd::Cut => Self::Cut,
            RecordedEnd::Backpressure => Self::Backpressure,
            RecordedEnd::Error => Self::Error,
        }
    }
}

impl RecordedRequest {
    /// It belongs to the workload: probes do not.
    pub fn counts(&self) -> bool {
        self.session >= 0
    }

    /// Tokens of its prompt.
    pub fn prompt(&self) -> usize {
        self.keep + self.new
    }
}

impl RecordedRun {
    /// Reads and checks a recording, JSON or JSON in gzip.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordingError> {
        let mut text = Vec::new();
        let unpacked = if bytes.starts_with(&[0x1f, 0x8b]) {
            flate2::read::MultiGzDecoder::new(bytes).take(MOST_BYTES).read_to_end(&mut text)
        } else {
            bytes.take(MOST_BYTES).read_to_end(&mut text)
        };
        unpacked.map_err(|error| RecordingError::Packed(error.to_string()))?;
        let mut json = serde_json::Deserializer::from_slice(&text);
        let field =
            |path: String, reason: serde_json::Error| RecordingError::Field { path, reason: reason.to_string() };
        let read: Self =
            serde_path_to_error::deserialize(&mut json).map_err(|e| field(e.path().to_string(), e.into_inner()))?;
        json.end().map_err(|e| field(".".to_owned(), e))?;
        read.check().map_err(RecordingError::Impossible)?;
        Ok(read)
    }

    /// How rows became batches.
    pub fn mode(&self) -> Result<Mode, RecordingError> {
        self.scheduler.parse().map_err(|error| RecordingError::Impossible(format!("{error}")))
    }

    /// How workers were chosen.
    pub fn policy_name(&self) -> Result<PolicyName, RecordingError> {
        self.policy.parse().map_err(|error| RecordingError::Impossible(format!("{error}")))
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format: it is {:?}, and {FORMAT:?} is read", self.format));
        }
        if self.runs.is_empty() {
            return Err("runs: there is none".into());
        }
        self.mode().and(self.policy_name().map(|_| ())).map_err(|error| error.to_string())?;
        self.calibration.iter().try_for_each(|run| run.check().map_err(|why| format!("calibration.{why}")))?;
        self.runs.iter().enumerate().try_for_each(|(at, run)| run.check().map_err(|why| format!("runs[{at}].{why}")))
    }
}

impl OneRun {
    fn check(&self) -> Result<(), String> {
        let Some(first) = self.workers.first() else { return Err("workers: there is none".into()) };
        for (at, worker) in self.workers.iter().enumerate() {
            let sizes = [worker.block_size, worker.blocks, worker.max_context, worker.max_rows.into()];
            if sizes.contains(&0) || worker.chunk_tokens == 0 || worker.vocab < 4 {
                return Err(format!("workers[{at}]: a size is 0, or the vocabulary below 4"));
            }
            if (worker.block_size, worker.vocab) != (first.block_size, first.vocab) {
                return Err(format!("workers[{at}]: its block size or vocabulary is not the first one's"));
            }
            if worker.cost_model.layout() != first.cost_model.layout() {
                return Err(format!("workers[{at}]: its layout is not the first one's"));
            }
        }
        if !self.requests.iter().any(RecordedRequest::counts) {
            return Err("requests: there is none".into());
        }
        let (mut tokens, mut last) = (0u64, 0);
        for (at, request) in self.requests.iter().enumerate() {
            let parent = match request.parent {
                None => 0,
                Some(parent) if parent < at => {
                    let parent = &self.requests[parent];
                    parent.prompt() + parent.output as usize
                }
                Some(parent) => return Err(format!("requests[{at}].parent: {parent} does not come before it")),
            };
            if request.keep > parent {
                return Err(format!("requests[{at}].keep: {} of the {parent} tokens before it", request.keep));
            }
            tokens = (request.keep as u64).saturating_add(request.new as u64).saturating_add(tokens);
            tokens = tokens.saturating_add(request.output.into());
            if tokens > MOST_TOKENS {
                return Err(format!("requests[{at}]: more than {MOST_TOKENS} tokens in all"));
            }
            if request.prompt() == 0 || request.output == 0 || request.output > request.limit {
                return Err(format!("requests[{at}]: an empty prompt, no output, or more of it than its limit"));
            }
            let times = [last, request.arrived_us, request.first_us, request.ended_us];
            if !times.is_sorted() || request.ended_us > MOST_TIME {
                return Err(format!("requests[{at}]: arrived, first token and end are not in order, or past a month"));
            }
            last = request.arrived_us;
        }
        match self.batches.iter().position(|batch| batch.worker >= self.workers.len()) {
            Some(at) => Err(format!("batches[{at}].worker: there are {}", self.workers.len())),
            None => Ok(()),
        }
    }

    /// How its workers lay batches out.
    pub fn layout(&self) -> Layout {
        self.workers.first().map_or(Layout::Paged, |worker| worker.cost_model.layout())
    }
}

/// A month, in microseconds.
const MOST_TIME: u64 = 31 * 86_400_000_000;
