//! A model pool as the front ends see it: names, tokenizer, template, and a way in.
//!
//! Knows what the pool's workers have in common. The scheduling of it lives in its dispatcher's task.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use router_core::{
    BlockHash, Config, DecisionId, ModelSpec, NewRequest, RequestId, Scheduler, Tokens, WorkerLoad, hash_root,
};
use serde_json::Value as Json;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::conversation::{Conversations, Turn};
use crate::convert::RowExtras;
use crate::dispatch::{self, Arrival, Batch, COMMANDS, Command, Decided, PoolState, ROW_UPDATES, UPDATES};
use crate::error::Error;
use crate::generation::{Generation, Job, Start};
use crate::metrics::Metrics;
use crate::pieces::Pieces;
use crate::sampling::{fault, no_such_id};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Texts that are tokenised or rendered at once; more wait. It is work for a processor, so more would gain nothing. A
/// conversation that is known goes there too: the way costs less (`make bench-core`) than rendering it, whose end nobody
/// knows before.
const ENCODERS: usize = 4;
/// Texts of more bytes than this are big: of those at most so many at once, so that small ones do not wait for them.
const BIG: (usize, usize) = (64 << 10, ENCODERS / 2);
/// Texts that may wait for that; more are answered 429.
const WAITING: usize = 1024;

/// The files of a model directory that the router needs, by name.
pub type Files = HashMap<String, Vec<u8>>;

/// Workers that serve the same model.
pub struct Pool {
    /// Names it is asked for by.
    pub names: Vec<String>,
    /// What its workers agree on.
    pub model: ModelSpec,
    /// When it came to be, in unix seconds.
    pub created: u64,
    /// What may be read of it at any time.
    pub state: Arc<PoolState>,
    /// Into its dispatcher.
    pub commands: mpsc::Sender<Command>,
    root: BlockHash,
    text: Arc<Text>,
    encoders: Arc<Semaphore>,
    big_encoders: Arc<Semaphore>,
    waiting: Semaphore,
    next_request: AtomicU64,
    metrics: Arc<Metrics>,
    timeout: Duration,
    /// Most unfinished rows of the scheduler.
    most_rows: usize,
}

/// Tokenizer and template of a model; either may be missing.
#[derive(Default)]
struct Text {
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<ChatTemplate>,
    conversations: Arc<Conversations>,
}

/// What a pool is made with, beside its model.
#[derive(Clone)]
pub struct PoolConfig {
    /// For the core.
    pub scheduler: Config,
    /// The policy's name, for metrics.
    pub policy: &'static str,
    /// Longest a request may take.
    pub timeout: Duration,
    /// Longest a request may wait to be begun; `None` is no limit of its own.
    pub queue_timeout: Option<Duration>,
    /// Folded into the root of all block hashes.
    pub fleet_key: String,
}

impl Pool {
    /// Loads tokenizer and template and starts the dispatcher. Slow: not on an async thread, but inside a runtime.
    pub fn start(
        names: Vec<String>,
        model: ModelSpec,
        files: &Files,
        config: &PoolConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, String> {
        let text = Text::load(files)?;
        if text.tokenizer.is_none() {
            warn!(
                model = names[0],
                "the model has no tokenizer.json: only token ids are served, and no text comes back"
            );
        } else if text.template.is_none() {
            warn!(model = names[0], "the model has no chat template: no chat");
        }
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let state = Arc::new(PoolState::default());
        let scheduler = Scheduler::new(model.clone(), config.scheduler.clone());
        let (of_state, of_metrics) = (Arc::clone(&state), Arc::clone(&metrics));
        tokio::spawn(dispatch::run(scheduler, config.policy, config.queue_timeout, receiver, of_state, of_metrics));
        let root = hash_root(&[&config.fleet_key, &model.digest, "", ""]);
        info!(model = names[0], digest = model.digest, "pool");
        Ok(Arc::new(Self {
            names,
            model,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            state,
            commands,
            root,
            text: Arc::new(text),
            encoders: Arc::new(Semaphore::new(ENCODERS)),
            big_encoders: Arc::new(Semaphore::new(BIG.1)),
            waiting: Semaphore::new(WAITING),
            next_request: AtomicU64::new(1),
            metrics,
            timeout: config.timeout,
            most_rows: config.scheduler.max_rows,
        }))
    }

    /// Whether its dispatcher runs; it ends when the pool is replaced, or with a bug.
    pub fn is_alive(&self) -> bool {
        !self.commands.is_closed()
    }

    /// Most tokens of prompt and output together.
    pub fn most_tokens(&self) -> Tokens {
        self.state.most_tokens()
    }

    /// How its tokens read one by one.
    pub fn pieces(&self) -> Pieces {
        Pieces::new(self.text.tokenizer.clone())
    }

    /// Names its weights in answers: what is drawn from one seed is the same where this is.
    pub fn fingerprint(&self) -> String {
        format!("fp_{}", self.model.digest.get(..10).unwrap_or(&self.model.digest))
    }

    /// Ids of a text prompt.
    pub async fn encode(&self, text: String) -> Result<Vec<u32>, Error> {
        if self.text.tokenizer.is_none() {
            return Err(Error::invalid("prompt", "this model has no tokenizer: send token ids"));
        }
        let most = self.most_tokens();
        self.text.check_length("prompt", &text, most)?;
        let encoded = self.blocking(text.len(), move |own| own.encode(&text, true)).await;
        encoded.map(|(ids, _)| ids)
    }

    /// Ids of a conversation that came in so many bytes, and where the answer to it will stand.
    pub async fn encode_chat(
        &self,
        messages: Vec<minijinja::Value>,
        tools: Option<minijinja::Value>,
        bytes: usize,
    ) -> Result<(Vec<u32>, Option<Turn>), Error> {
        if self.text.tokenizer.is_none() || self.text.template.is_none() {
            return Err(Error::invalid("messages", "this model has no chat template: use /v1/completions"));
        }
        let most = self.most_tokens();
        self.blocking(bytes, move |own| {
            let template = own.template.as_ref().ok_or_else(|| Error::Internal("no template".into()))?;
            let text = template.render(&messages, tools.as_ref()).map_err(|error| {
                let by_tools = tools.is_some() && template.render(&messages, None).is_ok();
                Error::invalid(if by_tools { "tools" } else { "messages" }, error.to_string())
            })?;
            own.check_length("messages", &text, most)?;
            own.encode(&text, false)
        })
        .await
    }

    /// Text of ids, special tokens written out.
    pub async fn decode(&self, ids: Vec<u32>) -> Result<String, Error> {
        self.check_ids("tokens", &ids)?;
        let most = self.most_tokens();
        if ids.len() as u64 > most.0 {
            let message = format!("too long for the context of {most}: {} tokens", ids.len());
            return Err(Error::ContextLength { message, param: "tokens" });
        }
        self.blocking(size_of_val(&*ids), move |own| Ok(own.tokenizer()?.decode_all(&ids))).await
    }

    /// How the vocabulary writes each of these ids.
    pub async fn token_strings(&self, ids: Vec<u32>) -> Result<Vec<String>, Error> {
        let bytes = size_of_val(&*ids);
        self.blocking(bytes, move |own| {
            let tokenizer = own.tokenizer()?;
            Ok(ids.iter().map(|id| tokenizer.token(*id)).collect())
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Text) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let overloaded = |_| Error::Overloaded { retry_after: Duration::from_secs(1) };
        let _place = self.waiting.try_acquire().map_err(overloaded)?;
        // Big ones wait for each other before they take a place that a small one could have.
        let big = if bytes > BIG.0 { Some(Arc::clone(&self.big_encoders).acquire_owned().await) } else { None };
        let permit = Arc::clone(&self.encoders).acquire_owned().await;
        let text = Arc::clone(&self.text);
        let client = Arc::new(());
        let waits = Arc::downgrade(&client);
        let work = tokio::task::spawn_blocking(move || {
            // Held by the work itself: a client that goes away does not make room for more before it is done.
            let _permits = (permit, big);
            if waits.strong_count() == 0 {
                return Err(Error::Internal("nobody waits for it".into()));
            }
            work(&text)
        });
        let done = work.await;
        drop(client);
        done.map_err(|error| Error::Internal(error.to_string()))?
    }

    /// Checks a request against the pool and gives it to the scheduler.
    pub fn submit(&self, mut job: Job, arrived: Instant) -> Result<Generation, Error> {
        self.check(&mut job)?;
        let request = RequestId(self.next_request.fetch_add(1, Ordering::Relaxed));
        let (sender, updates) = mpsc::channel(UPDATES.max(ROW_UPDATES * job.n as usize));
        let arrival = Arrival {
            request: NewRequest {
                id: request,
                prompt: Arc::clone(&job.prompt),
                root: self.root,
                choices: job.n,
                max_tokens: Tokens(job.limits.max_tokens.into()),
                urgent: job.urgent,
            },
            extras: RowExtras {
                sampling: job.sampling.clone(),
                limits: job.limits.clone(),
                model: job.model.clone(),
                traceparent: job.traceparent.clone(),
            },
            updates: sender,
        };
        self.commands.try_send(Command::Arrive(arrival)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::Overloaded { retry_after: Duration::from_secs(1) },
            mpsc::error::TrySendError::Closed(_) => Error::NoWorker,
        })?;
        let start = Start {
            request,
            commands: self.commands.clone(),
            updates,
            tokenizer: self.text.tokenizer.clone(),
            arrived,
            timeout: self.timeout,
            metrics: Arc::clone(&self.metrics),
        };
        Ok(Generation::new(start, &job))
    }

    fn check_ids(&self, param: &str, ids: &[u32]) -> Result<(), Error> {
        let vocab = self.model.vocab;
        match ids.iter().find(|id| **id >= vocab) {
            Some(id) => Err(Error::invalid(param, no_such_id(*id, vocab))),
            None => Ok(()),
        }
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<(), Error> {
        if self.state.ready() == 0 {
            return Err(Error::NoWorker);
        }
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "the prompt is empty"));
        }
        self.check_ids("prompt", prompt)
    }

    fn check(&self, job: &mut Job) -> Result<(), Error> {
        self.check_prompt(&job.prompt)?;
        if job.n as usize > self.most_rows {
            let message = format!("at most {} answers at once: {}", self.most_rows, job.n);
            return Err(Error::invalid("n", message));
        }
        if !job.stop.is_empty() && self.text.tokenizer.is_none() {
            return Err(Error::invalid("stop", "this model has no tokenizer: use stop_token_ids"));
        }
        let (prompt, most) = (job.prompt.len() as u64, self.most_tokens().0);
        // An unset limit is the rest of the context.
        let wanted = match job.limits.max_tokens {
            0 => 1,
            wanted => u64::from(wanted),
        };
        check_context(prompt, wanted, most)?;
        if job.limits.max_tokens == 0 {
            job.limits.max_tokens = u32::try_from(most - prompt).unwrap_or(u32::MAX);
        }
        fault(&job.sampling, &job.limits, self.model.vocab)
            .map_or(Ok(()), |(field, message)| Err(Error::invalid(field, message)))
    }

    /// Where a prompt would go now. Nothing comes of it.
    pub async fn route(&self, prompt: Vec<u32>) -> Result<crate::proto::Decision, Error> {
        self.check_prompt(&prompt)?;
        check_context(prompt.len() as u64, 1, self.most_tokens().0)?;
        let (sender, answer) = oneshot::channel();
        let command = Command::Route { prompt, root: self.root, answer: sender };
        self.commands.send(command).await.map_err(|_| Error::NoWorker)?;
        answer.await.ok().flatten().ok_or(Error::NoWorker)
    }

    /// The latest decisions, oldest first: all of them, or the one of this number.
    pub async fn decisions(&self, wanted: Option<DecisionId>) -> Vec<Decided> {
        let (sender, answer) = oneshot::channel();
        if self.commands.send(Command::Decisions(wanted, sender)).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// The latest batches, oldest first.
    pub async fn batches(&self) -> Vec<Batch> {
        let (sender, answer) = oneshot::channel();
        if self.commands.send(Command::Batches(sender)).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// What the core believes of the workers.
    pub async fn loads(&self) -> Vec<WorkerLoad> {
        let (sender, answer) = oneshot::channel();
        if self.commands.send(Command::Loads(sender)).await.is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }
}

fn check_context(prompt: u64, wanted: u64, most: u64) -> Result<(), Error> {
    if prompt.saturating_add(wanted) <= most {
        return Ok(());
    }
    let param = if prompt >= most { "prompt" } else { "max_tokens" };
    let message = format!("too long for the context of {most} tokens: {prompt} of the prompt and {wanted} to generate");
    Err(Error::ContextLength { message, param })
}

impl Text {
    fn load(files: &Files) -> Result<Self, String> {
        let tokenizer = files.get("tokenizer.json").map(|bytes| Tokenizer::from_json(bytes));
        let tokenizer = tokenizer.transpose().map_err(|error| error.to_string())?.map(Arc::new);
        let config = match files.get("tokenizer_config.json") {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|error| format!("tokenizer_config.json: {error}"))?,
            None => Json::Null,
        };
        let jinja = files.get("chat_template.jinja").map(|bytes| std::str::from_utf8(bytes));
        let jinja = jinja.transpose().map_err(|error| format!("chat_template.jinja: {error}"))?;
        // A template that does not compile costs the chat, not the model.
        let template = ChatTemplate::from_files(jinja, &config).unwrap_or_else(|error| {
            warn!(%error, "the chat template cannot be used");
            None
        });
        Ok(Self { tokenizer, template, conversations: Arc::default() })
    }

    fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer.as_deref().ok_or_else(|| Error::invalid("model", "this model has no tokenizer"))
    }

    /// Refuses what has more bytes than the longest tokens could stand for, without tokenising it.
    fn check_length(&self, param: &'static str, text: &str, most: Tokens) -> Result<(), Error> {
        let longest = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.most_bytes());
        let Some(longest) = longest.filter(|_| most.0 > 0) else { return Ok(()) };
        if text.len() as u64 > most.0.saturating_mul(longest as u64) {
            let message = format!("too long for the context of {most}: {} bytes of the prompt", text.len());
            return Err(Error::ContextLength { message, param });
        }
        Ok(())
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<(Vec<u32>, Option<Turn>), Error> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| Error::Internal("no tokenizer".into()))?;
        let encoded = match tokenizer.split() {
            None => tokenizer.encode(text, add_special_tokens).map(|ids| (ids, None)),
            Some(split) => self.conversations.encode(tokenizer, split, text).map(|(ids, turn)| {
                let bare = !add_special_tokens || split.before.is_empty() && split.after.is_empty();
                (if bare { ids } else { [&split.before, &ids, &split.after].map(Vec::as_slice).concat() }, turn)
            }),
        };
        encoded.map_err(|error| Error::invalid("prompt", error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use router_core::{BlockSize, Blocks, Epoch, Layout, Mode, PolicyName, WorkerMessage, WorkerSpec};

    use super::*;

    /// A pool with one ready worker, whose further commands come here.
    async fn pool() -> (Arc<Pool>, mpsc::Receiver<Command>) {
        let block_size = BlockSize::new(16).expect("not zero");
        let model = ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size, vocab: 100 };
        let scheduler =
            Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: None, seed: 0, max_rows: 8 };
        let timeout = Duration::from_secs(1);
        let config =
            PoolConfig { scheduler, policy: "product", timeout, queue_timeout: None, fleet_key: String::new() };
        let files = Files::new();
        let mut pool =
            Pool::start(vec!["m".into()], model.clone(), &files, &config, Arc::default()).expect("it starts");
        let spec = WorkerSpec {
            name: "w".into(),
            epoch: Epoch(1),
            model,
            blocks: Blocks(100),
            max_rows: 8,
            max_context: Tokens(1000),
            chunk: Tokens(512),
            layout: Layout::Paged,
            cost: None,
        };
        let ((link, _), (fate, _), (seat, seated)) = (mpsc::channel(8), oneshot::channel(), oneshot::channel());
        pool.commands.send(Command::Join { spec, link, fate, seat }).await.expect("it runs");
        let seat = seated.await.expect("a seat");
        let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes: Vec::new() };
        pool.commands.send(Command::Message { seat, seq: 1, message }).await.expect("it runs");
        assert_eq!(pool.loads().await.len(), 1);
        let (sender, commands) = mpsc::channel(8);
        Arc::get_mut(&mut pool).expect("nobody else has it").commands = sender;
        (pool, commands)
    }

    #[tokio::test]
    async fn urgency_reaches_the_core() {
        let (pool, mut commands) = pool().await;
        let mut running = Vec::new();
        for urgent in [false, true] {
            let job = Job {
                model: "m".into(),
                prompt: Arc::from([5]),
                n: 1,
                sampling: crate::proto::Sampling::default(),
                limits: crate::proto::Limits { max_tokens: 1, ..crate::proto::Limits::default() },
                stop: Vec::new(),
                turn: None,
                urgent,
                traceparent: String::new(),
            };
            // Kept: dropped it would be cancelled.
            running.push(pool.submit(job, Instant::now()).expect("it is taken"));
            let Some(Command::Arrive(arrival)) = commands.recv().await else { panic!("no arrival") };
            assert_eq!(arrival.request.urgent, urgent);
        }
    }
}
