//! The router without the scheduler, for those who embed it in front of engines of their own.
//!
//! It knows workers by name and what it sent them. It does not know rows, slices, plans or time: an engine decides
//! itself what runs when, and says three things at most of a decision: prefilled, finished, never ran.
//!
//! A decision moves at once: one more in the batch, its new tokens queued, its blocks committed in the index, so that a
//! follow-up hits before the first prefill ends. What it moved is taken back exactly when it ends. Beside that a worker
//! holds blocks because its engine reports them, or, where an engine reports nothing and its capacity is known,
//! because they were used there last.
//!
//! How often requests come, and which prefixes are popular among them, is counted at decisions and never taken back: it says
//! what was asked for.

mod lru;
mod prompt;

use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::HashMap;

use self::lru::Lru;
pub use self::prompt::Prompt;
use crate::anticipation::{Anticipation, Arrivals, PrefillTime};
use crate::block::{BlockHash, new_tokens};
use crate::guard::{Guard, Guarding, Hotspots, Sighting};
use crate::ids::{DecisionId, WorkerId};
use crate::index::{BlockTrie, PrefixIndex};
use crate::policy::{Candidate, Policy, View, least};
use crate::units::{BlockSize, Blocks, Micros, Tokens};

/// What a decision moves besides the count of rows and their new tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Commit {
    /// The prompt's blocks enter the index at once, so that a follow-up hits before the first prefill ends.
    #[default]
    Prefixes,
    /// The index has what engines report, and nothing else: the paper's form (arXiv 2603.15202).
    Load,
}

/// What a decision is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Tokens of the prompt.
    pub tokens: Tokens,
    /// Decisions made before this one.
    pub turn: u64,
    /// All workers, in order of their slots.
    pub candidates: Vec<Candidate>,
    /// Their names.
    pub names: Arc<[Arc<str>]>,
    /// What is expected of the requests to come.
    pub anticipation: Anticipation,
}

impl Seen {
    /// As a policy sees it.
    pub fn view(&self) -> View<'_> {
        View { candidates: &self.candidates, turn: self.turn, anticipation: self.anticipation }
    }
}

/// A decision with all it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its name; `None` if it was asked for only, and moved nothing.
    pub id: Option<DecisionId>,
    /// What it was made from.
    pub seen: Seen,
    /// The score of each candidate; the smallest wins.
    pub scores: Vec<u128>,
    /// Which candidate won.
    pub at: usize,
    /// What the hotspot guard made of the prompt, if there is one and the prompt is one of a class.
    pub guard: Option<Sighting>,
}

impl Choice {
    /// The winner as it was before the decision.
    pub fn chosen(&self) -> &Candidate {
        &self.seen.candidates[self.at]
    }

    /// The winner's name.
    pub fn worker(&self) -> &str {
        &self.seen.names[self.at]
    }
}

/// What the router believes of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerState {
    /// Its name.
    pub name: Arc<str>,
    /// `b`: decisions for it that have not ended.
    pub batch_size: u64,
    /// `Q`: new tokens of those not prefilled yet.
    pub queued: Tokens,
    /// Blocks of it in the index: stored, predicted or committed.
    pub indexed: Blocks,
    /// Its capacity, if what it holds is predicted.
    pub capacity: Option<Blocks>,
}

/// Why the router refuses. Nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouterError {
    /// There is no worker at all.
    #[error("no worker to route to\nadd one first")]
    NoWorker,
    /// None of this name.
    #[error("no such worker: {0}")]
    UnknownWorker(String),
    /// There is one of this name.
    #[error("there is a worker of this name: {0}\nremove it first if it started anew")]
    WorkerExists(String),
    /// What this worker holds is predicted, so it cannot report it.
    #[error("what this worker holds is predicted: {0}\nadd it without a capacity if its engine reports its blocks")]
    Predicted(String),
    /// A prompt without tokens.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A policy that did not score every candidate.
    #[error("a policy gives one score for each candidate: got {got} for {want}")]
    Scores {
        /// Scores given.
        got: usize,
        /// Candidates.
        want: usize,
    },
}

struct Worker {
    name: Arc<str>,
    batch_size: u64,
    queued: Tokens,
    /// `None`: its engine reports.
    predicted: Option<Lru>,
    /// When it was last known to have computed tokens of a prompt.
    prefilled: Micros,
}

impl Worker {
    /// Time that prefills took of which nothing was said before, if one of them could begin then. A worker's prefills run
    /// one after another: no time counts twice.
    fn since(&mut self, begin: Micros, now: Micros) -> Micros {
        now.saturating_sub(begin.max(std::mem::replace(&mut self.prefilled, now)))
    }
}

/// A decision that has not ended.
struct Flight {
    worker: WorkerId,
    prompt: Prompt,
    at: Micros,
    new_tokens: Tokens,
    prefilled: bool,
}

/// Routes prompts to named workers.
///
/// ```
/// use router_core::{BlockHash, BlockSize, Product, Prompt, Router};
/// let size = BlockSize::new(16).expect("not zero");
/// let mut router = Router::new(size);
/// router.add_worker("a", None)?;
/// router.add_worker("b", None)?;
/// let prompt = Prompt::new(BlockHash(0), &[7; 64], size);
/// let first = router.route(prompt.clone(), &Product, true)?;
/// first.id.map(|id| router.prefilled(id));
/// let next = router.route(prompt, &Product, true)?;
/// assert_eq!(next.worker(), first.worker(), "16 new tokens in a batch of two, or 64 alone elsewhere");
/// # Ok::<(), router_core::RouterError>(())
/// ```
pub struct Router {
    size: BlockSize,
    index: BlockTrie,
    workers: BTreeMap<WorkerId, Worker>,
    slots: HashMap<Arc<str>, WorkerId>,
    /// Names of `workers` in their order: shared by all decisions until a worker comes or goes.
    names: Arc<[Arc<str>]>,
    flights: HashMap<DecisionId, Flight>,
    turn: u64,
    depths: Vec<usize>,
    commits: Commit,
    guard: Option<Guard>,
    now: Micros,
    arrivals: Arrivals,
    prefills: PrefillTime,
}

impl Router {
    /// Without workers. Prompts and reports must be hashed with the same block size.
    pub fn new(size: BlockSize) -> Self {
        Self {
            size,
            index: BlockTrie::default(),
            workers: BTreeMap::new(),
            slots: HashMap::new(),
            names: Arc::new([]),
            flights: HashMap::new(),
            turn: 0,
            depths: Vec::new(),
            commits: Commit::default(),
            guard: None,
            now: Micros::ZERO,
            arrivals: Arrivals::default(),
            prefills: PrefillTime::default(),
        }
    }

    /// With decisions that move so much.
    #[must_use]
    pub fn with_commit(self, commits: Commit) -> Self {
        Self { commits, ..self }
    }

    /// With a hotspot guard that does this; at first there is none. It sees what is committed from here on, and nothing of what
    /// was before.
    #[must_use]
    pub fn with_guard(self, guarding: Guarding) -> Self {
        Self { guard: Guard::new(guarding), ..self }
    }

    /// What the hotspot guard has seen and done; `None` without one.
    pub fn hotspots(&self) -> Option<Hotspots> {
        self.guard.as_ref().map(Guard::hotspots)
    }

    /// Tells the time, for what is measured by it. A time before the last one changes nothing.
    pub fn advance(&mut self, now: Micros) {
        self.now = self.now.max(now);
    }

    /// A worker that holds nothing yet. With a `capacity`, what it holds is predicted; without, it reports.
    pub fn add_worker(&mut self, name: &str, capacity: Option<Blocks>) -> Result<(), RouterError> {
        if self.slots.contains_key(name) {
            return Err(RouterError::WorkerExists(name.to_owned()));
        }
        // Slots stay dense: the first free one.
        let slot = (0u32..).zip(self.workers.keys()).find(|(slot, worker)| *slot != worker.0);
        let worker = WorkerId(slot.map_or(self.workers.len() as u32, |(slot, _)| slot));
        let name: Arc<str> = Arc::from(name);
        let predicted = capacity.map(|blocks| Lru::new(blocks.0));
        let (name_of, queued, prefilled) = (Arc::clone(&name), Tokens::ZERO, self.now);
        self.workers.insert(worker, Worker { name: name_of, batch_size: 0, queued, predicted, prefilled });
        self.slots.insert(name, worker);
        self.rename();
        Ok(())
    }

    /// Forgets a worker, what it holds and the decisions for it.
    pub fn remove_worker(&mut self, name: &str) -> Result<(), RouterError> {
        let worker = self.slot(name)?;
        self.slots.remove(name);
        self.workers.remove(&worker);
        self.flights.retain(|_, flight| flight.worker != worker);
        self.index.remove_worker(worker);
        self.rename();
        Ok(())
    }

    /// Chooses a worker by `policy`, and counts the prompt there unless this is only a question (`commit` is false).
    pub fn route(&mut self, prompt: Prompt, policy: &dyn Policy, commit: bool) -> Result<Choice, RouterError> {
        self.route_by(prompt, commit, &mut |seen| {
            Ok((0..seen.candidates.len()).map(|at| policy.score(seen.view(), at)).collect())
        })
    }

    /// Like [`Self::route`], by any function from what is seen to one score for each candidate.
    pub fn route_by<E: From<RouterError>>(
        &mut self,
        prompt: Prompt,
        commit: bool,
        score: &mut dyn FnMut(&Seen) -> Result<Vec<u128>, E>,
    ) -> Result<Choice, E> {
        let mut seen = self.look(&prompt)?;
        let scores = score(&seen)?;
        let (got, want) = (scores.len(), seen.candidates.len());
        let best = least(seen.view(), &scores).filter(|_| got == want).ok_or(RouterError::Scores { got, want })?;
        let guard = self.guard.as_ref();
        let guard = guard.and_then(|guard| guard.judge(prompt.chain(), &self.depths, &mut seen.candidates, best));
        let at = if guard.is_some_and(|sighting| sighting.filtered) { least(seen.view(), &scores) } else { None };
        let mut choice = Choice { id: None, seen, scores, at: at.unwrap_or(best), guard };
        if commit {
            if let Some(guard) = &mut self.guard {
                guard.decided(choice.guard.as_ref());
                guard.count(prompt.chain(), want);
            }
            choice.id = Some(self.commit(prompt, *choice.chosen()));
        }
        Ok(choice)
    }

    /// One after another, each decision counted before the next is made. If one fails, none was made; that the prompts before it
    /// were asked for stays known.
    pub fn route_many<E: From<RouterError>>(
        &mut self,
        prompts: Vec<Prompt>,
        commit: bool,
        score: &mut dyn FnMut(&Seen) -> Result<Vec<u128>, E>,
    ) -> Result<Vec<Choice>, E> {
        let turn = self.turn;
        let mut choices = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            match self.route_by(prompt, commit, score) {
                Ok(choice) => choices.push(choice),
                Err(error) => {
                    choices.iter().filter_map(|choice: &Choice| choice.id).for_each(|id| {
                        self.take_back(id);
                    });
                    self.turn = turn;
                    return Err(error);
                }
            }
        }
        Ok(choices)
    }

    /// So many of its prompt's tokens are left to compute, as its engine says. Whether it was in flight and not prefilled.
    pub fn left(&mut self, id: DecisionId, tokens: Tokens) -> bool {
        let Some(flight) = self.flights.get_mut(&id).filter(|flight| !flight.prefilled) else { return false };
        let before = std::mem::replace(&mut flight.new_tokens, tokens);
        if let Some(worker) = self.workers.get_mut(&flight.worker) {
            worker.queued = worker.queued.saturating_sub(before) + tokens;
            let computed = before.saturating_sub(tokens);
            if computed > Tokens::ZERO {
                self.prefills.observe(computed, worker.since(flight.at, self.now));
            }
        }
        true
    }

    /// Its prompt is computed. Whether it was in flight and not prefilled.
    pub fn prefilled(&mut self, id: DecisionId) -> bool {
        let Some(flight) = self.flights.get_mut(&id).filter(|flight| !flight.prefilled) else { return false };
        flight.prefilled = true;
        let (prompt, slot) = (flight.prompt.clone(), flight.worker);
        if let Some(worker) = self.workers.get_mut(&slot) {
            worker.queued = worker.queued.saturating_sub(flight.new_tokens);
            self.prefills.observe(flight.new_tokens, worker.since(flight.at, self.now));
        }
        self.predict(slot, prompt.chain(), &[]);
        true
    }

    /// It ran and ended, with these ids. Whether it was in flight.
    pub fn finished(&mut self, id: DecisionId, output: &[u32]) -> bool {
        let Some(flight) = self.end(id) else { return false };
        self.predict(flight.worker, flight.prompt.chain(), &flight.prompt.continued(output));
        true
    }

    /// It never ran: as if it had not been made. Whether it was in flight.
    pub fn take_back(&mut self, id: DecisionId) -> bool {
        self.end(id).is_some()
    }

    /// What a worker's engine says of its blocks: all are gone, then these are gone, then these are there.
    pub fn report(
        &mut self,
        name: &str,
        cleared: bool,
        removed: &[BlockHash],
        stored: &[BlockHash],
    ) -> Result<(), RouterError> {
        let worker = self.slot(name)?;
        if self.workers[&worker].predicted.is_some() {
            return Err(RouterError::Predicted(name.to_owned()));
        }
        if cleared {
            self.index.clear_stored(worker);
        }
        for &block in removed {
            self.index.evict(worker, block);
        }
        for &block in stored {
            self.index.store(worker, block);
        }
        Ok(())
    }

    /// All workers, in order of their slots.
    pub fn workers(&self) -> impl Iterator<Item = WorkerState> {
        self.workers.iter().map(|(&slot, worker)| WorkerState {
            name: Arc::clone(&worker.name),
            batch_size: worker.batch_size,
            queued: worker.queued,
            indexed: self.index.blocks(slot),
            capacity: worker.predicted.as_ref().map(|lru| Blocks(lru.capacity())),
        })
    }

    fn slot(&self, name: &str) -> Result<WorkerId, RouterError> {
        self.slots.get(name).copied().ok_or_else(|| RouterError::UnknownWorker(name.to_owned()))
    }

    fn rename(&mut self) {
        self.names = self.workers.values().map(|worker| Arc::clone(&worker.name)).collect();
    }

    fn look(&mut self, prompt: &Prompt) -> Result<Seen, RouterError> {
        if prompt.tokens == Tokens::ZERO {
            return Err(RouterError::EmptyPrompt);
        }
        if self.workers.is_empty() {
            return Err(RouterError::NoWorker);
        }
        self.index.matched(prompt.chain(), &mut self.depths);
        let depth = |worker: WorkerId| self.depths.get(worker.0 as usize).copied().unwrap_or(0);
        let candidates = self.workers.iter().map(|(&worker, w)| Candidate {
            worker,
            new_tokens: new_tokens(prompt.tokens, depth(worker), self.size),
            queued: w.queued,
            batch_size: w.batch_size,
            // An embedded router does not know how long things take, nor what memory a running batch may need.
            work: Micros::ZERO,
            joined: Micros::ZERO,
            free: Blocks::ZERO,
            filtered: false,
        });
        let candidates = candidates.collect();
        let arrivals = self.arrivals.rate(self.now) / self.workers.len() as f64;
        let anticipation = Anticipation::new(arrivals, self.prefills.mean());
        let names = Arc::clone(&self.names);
        Ok(Seen { tokens: prompt.tokens, turn: self.turn, candidates, names, anticipation })
    }

    fn commit(&mut self, prompt: Prompt, at: Candidate) -> DecisionId {
        let id = DecisionId(self.turn);
        self.turn += 1;
        if let Some(worker) = self.workers.get_mut(&at.worker) {
            worker.batch_size += 1;
            worker.queued += at.new_tokens;
        }
        if self.commits == Commit::Prefixes {
            self.index.commit(at.worker, prompt.chain());
        }
        self.arrivals.observe(self.now);
        let new_tokens = at.new_tokens;
        let flight = Flight { worker: at.worker, prompt, at: self.now, new_tokens, prefilled: false };
        self.flights.insert(id, flight);
        id
    }

    /// Takes back exactly what the decision moved.
    fn end(&mut self, id: DecisionId) -> Option<Flight> {
        let flight = self.flights.remove(&id)?;
        if let Some(worker) = self.workers.get_mut(&flight.worker) {
            worker.batch_size -= 1;
            if !flight.prefilled {
                worker.queued = worker.queued.saturating_sub(flight.new_tokens);
            }
        }
        if self.commits == Commit::Prefixes {
            self.index.take_back(flight.worker, flight.prompt.chain());
        }
        Some(flight)
    }

    /// These blocks were used on the worker. The last first, so that the end of a chain goes before its beginning: a
    /// block is of no use without those before it.
    fn predict(&mut self, slot: WorkerId, prompt: &[BlockHash], output: &[BlockHash]) {
        let Some(lru) = self.workers.get_mut(&slot).and_then(|worker| worker.predicted.as_mut()) else { return };
        for &block in prompt.iter().chain(output).rev() {
            if lru.touch(block) {
                self.index.store(slot, block);
            }
        }
        while let Some(block) = lru.evict() {
            self.index.evict(slot, block);
        }
    }
}

#[cfg(test)]
mod tests;
