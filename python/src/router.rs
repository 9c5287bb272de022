//! The in-process router: one lock around the core's, always taken with the interpreter released.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Instant;

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use pyo3::{PyTraverseError, PyVisit};
use router_core::{BlockHash, BlockSize, Blocks, Choice, DecisionId, Guarding, Micros, PolicyName, Prompt, Seen};
use router_server::tokenizer::Tokenizer;

use crate::class::Class;
use crate::decision::{Decision, candidates};
use crate::error::{Error, no_times, unknown_policy};
use crate::ids::ids;

enum Policy {
    Named(PolicyName),
    Callable(Py<PyAny>),
}

/// The router in your own process, in front of engines of your own.
///
/// A decision counts at once: the worker's batch is one larger, its new tokens are queued, and the prompt's blocks are
/// taken to be there, so that a follow-up finds them before the first prefill ends. Tell the router how it went on,
/// with ``prefilled`` at the first token and ``finished`` at the end; ``take_back`` if the engine never ran it.
///
/// >>> router = Router()
/// >>> router.add_worker("a", blocks=10_000)
/// >>> router.add_worker("b", blocks=10_000)
/// >>> turn = list(range(100))
/// >>> first = router.route(turn)
/// >>> first.worker, first.new_tokens
/// ('a', 100)
/// >>> router.prefilled(first)
/// True
/// >>> router.finished(first, output=[7, 8, 9])
/// True
/// >>> second = router.route(turn + [7, 8, 9] + list(range(200, 220)))
/// >>> second.worker, second.cached_tokens, second.new_tokens
/// ('a', 96, 27)
/// >>> router.workers()[0]
/// WorkerLoad(name='a', queued_tokens=27, batch_size=1, indexed_blocks=7, blocks=10000)
///
/// What an engine holds is known in one of two ways. One with KV events reports blocks by the hashes of ``hash_blocks``:
///
/// >>> router.add_worker("c")
/// >>> router.report("c", stored=router.hash_blocks(range(48)))
/// >>> router.route(range(64), commit=False).candidates[2].new_tokens
/// 16
///
/// One without is added with its capacity in ``blocks``: it is taken to hold what was used there last.
///
/// A policy is a name (``product``, ``product_anticipating``, ``round_robin``, ``random``, ``least_requests``) or a
/// callable that takes a `View` and returns one int of at least 0 for each candidate; the smallest wins. What it raises
/// comes out of ``route``, and nothing has changed then. It must not call its own router (RuntimeError), nor wait for a thread
/// that does: the router is locked while it runs.
///
/// Where many of the latest prompts begin with a prefix that few workers hold, and all of them would go there, a guard
/// keeps some of them off until enough workers hold it; ``Decision.filtered`` says so. ``docs/hotspot.md`` has the why.
///
/// >>> longest_queue_last = Router(lambda view: [c.queued_tokens for c in view.candidates])
///
/// All methods may be called from any thread; the heavy part runs with the interpreter released.
///
/// Args:
///     policy: name or callable; ``product_anticipating`` if None.
///     block_size: tokens a KV block, as in the engines.
///     hash_root: u64 at the start of every chain of block hashes.
///     tokenizer: a ``tokenizer.json`` or the directory it is in, for prompts given as text.
///     seed: for ``random``.
///
/// Raises:
///     UnknownPolicy: no policy of this name.
///     ValueError: ``block_size`` is 0, or the tokenizer's file is none.
///     OSError: the tokenizer's file cannot be read.
///     TypeError: ``policy`` is neither a name nor callable.
#[pyclass(frozen, module = "scls_router")]
pub(crate) struct Router {
    core: Mutex<router_core::Router>,
    /// Its clock begins here.
    start: Instant,
    /// The thread in which a policy written in Python runs now: it holds the lock.
    deciding: Mutex<Option<ThreadId>>,
    policy: Policy,
    policy_name: Arc<str>,
    seed: u64,
    size: BlockSize,
    root: BlockHash,
    tokenizer: Option<Tokenizer>,
}

#[pymethods]
impl Router {
    #[new]
    #[pyo3(signature = (policy = None, *, block_size = 16, hash_root = 0, tokenizer = None, seed = 0))]
    fn new(
        py: Python<'_>,
        policy: Option<Bound<'_, PyAny>>,
        block_size: u32,
        hash_root: u64,
        tokenizer: Option<PathBuf>,
        seed: u64,
    ) -> PyResult<Self> {
        let (policy, policy_name) = match policy {
            None => (Policy::Named(PolicyName::default()), Arc::from(PolicyName::default().as_str())),
            Some(policy) => read_policy(&policy)?,
        };
        let size = crate::block_size(block_size)?;
        let tokenizer = tokenizer.map(|path| py.detach(|| load(&path))).transpose()?;
        let core = Mutex::new(router_core::Router::new(size).with_guard(Guarding::Filter));
        let (deciding, root) = (Mutex::new(None), BlockHash(hash_root));
        let start = Instant::now();
        Ok(Self { core, start, deciding, policy, policy_name, seed, size, root, tokenizer })
    }

    /// A worker that holds nothing yet.
    ///
    /// Args:
    ///     name: yours, as decisions will have it.
    ///     blocks: KV blocks of an engine that does not report: what it holds is predicted, least recently used blocks
    ///         given up first. None for an engine whose blocks you will ``report``.
    ///
    /// Raises:
    ///     WorkerExists: there is one of this name.
    #[pyo3(signature = (name, *, blocks = None))]
    fn add_worker(&self, py: Python<'_>, name: &str, blocks: Option<u64>) -> PyResult<()> {
        self.with(py, |core| core.add_worker(name, blocks.map(Blocks)))?.map_err(|error| Error::from(error).into_py(py))
    }

    /// Forgets a worker, its blocks and the decisions for it, which have then ended.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    fn remove(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.with(py, |core| core.remove_worker(name))?.map_err(|error| Error::from(error).into_py(py))
    }

    /// Chooses a worker.
    ///
    /// Args:
    ///     prompt: token ids, as `hash_blocks` takes them, or a text if there is a tokenizer (special tokens added).
    ///     commit: False only asks: nothing changes, and the decision has no ``id``.
    ///
    /// Raises:
    ///     NoWorker: there is none.
    ///     ValueError: no tokens, ids out of range, a text without a tokenizer, or scores that are negative or not one
    ///         for each candidate.
    ///     TypeError: this is no prompt, or a score is not an int.
    #[pyo3(signature = (prompt, *, commit = true))]
    fn route(&self, py: Python<'_>, prompt: &Bound<'_, PyAny>, commit: bool) -> PyResult<Decision> {
        let mut choices = self.decide(py, vec![self.prompt(prompt)?], commit)?;
        choices.pop().ok_or_else(|| PyRuntimeError::new_err("one prompt, no decision"))
    }

    /// As ``route`` for one after another, in one call: each decision counts before the next is made.
    ///
    /// If one fails none was made. An array of shape ``[prompts, tokens]`` is as many prompts.
    #[pyo3(signature = (prompts, *, commit = true))]
    fn route_many(&self, py: Python<'_>, prompts: &Bound<'_, PyAny>, commit: bool) -> PyResult<Vec<Decision>> {
        if prompts.is_instance_of::<PyString>() || prompts.is_instance_of::<PyBytes>() {
            return Err(PyTypeError::new_err("route_many takes several prompts: got one, which is for route"));
        }
        let prompts = prompts.try_iter()?.map(|prompt| self.prompt(&prompt?)).collect::<PyResult<_>>()?;
        self.decide(py, prompts, commit)
    }

    /// Its prompt is computed: the engine gave a first token. ``finished`` implies it.
    ///
    /// Returns:
    ///     False if the decision has ended (or its worker was removed) or was prefilled before; nothing changes then.
    ///
    /// Raises:
    ///     ValueError: the decision was made with ``commit=False``.
    fn prefilled(&self, py: Python<'_>, decision: &Decision) -> PyResult<bool> {
        let id = committed(decision)?;
        self.with(py, |core| core.prefilled(id))
    }

    /// It ran and ended, however it ended: what the decision counted is taken back.
    ///
    /// Args:
    ///     decision: what ``route`` returned.
    ///     output: ids the engine generated. Where what a worker holds is predicted, the blocks they complete are
    ///         predicted too, but for the last id, whose KV no engine computes.
    ///
    /// Returns:
    ///     False if it had ended before (or its worker was removed), so that it is safe in a ``finally``.
    ///
    /// Raises:
    ///     ValueError: the decision was made with ``commit=False``, or ids are out of range.
    #[pyo3(signature = (decision, output = None))]
    fn finished(&self, py: Python<'_>, decision: &Decision, output: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let id = committed(decision)?;
        let output = output.map(ids).transpose()?.unwrap_or_default();
        self.with(py, |core| core.finished(id, &output))
    }

    /// It never ran: as if it had not been made. If its prompt was prefilled, those blocks stay.
    ///
    /// Returns:
    ///     False if it had ended before.
    ///
    /// Raises:
    ///     ValueError: the decision was made with ``commit=False``.
    fn take_back(&self, py: Python<'_>, decision: &Decision) -> PyResult<bool> {
        let id = committed(decision)?;
        self.with(py, |core| core.take_back(id))
    }

    /// What the engine says of its KV cache. Committed blocks count beside it until their decisions end.
    ///
    /// Engines name blocks by hashes of their own (vLLM's and SGLang's events bring the ids along): keep which is which.
    ///
    /// >>> router, ours = Router(), {}
    /// >>> router.add_worker("a")
    /// >>> def block_stored(parent, blocks, token_ids):
    /// ...     hashes = hash_blocks(ours.get(parent, router.hash_root), token_ids, router.block_size)
    /// ...     ours.update(zip(blocks, hashes))
    /// ...     router.report("a", stored=hashes)
    /// >>> def block_removed(blocks):
    /// ...     router.report("a", removed=[ours.pop(block) for block in blocks])
    /// >>> block_stored(None, ["x", "y"], list(range(32)))
    /// >>> block_stored("y", ["z"], list(range(32, 48)))
    /// >>> router.route(range(64), commit=False).cached_tokens
    /// 48
    /// >>> block_removed(["z"])
    /// >>> router.route(range(64), commit=False).cached_tokens
    /// 32
    ///
    /// Args:
    ///     worker: one added without ``blocks``.
    ///     stored: hashes of blocks that are there now (see ``hash_blocks``), applied last.
    ///     removed: hashes of blocks that are there no more, applied before.
    ///     cleared: all that was stored is gone, applied first.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    ///     ValueError: what this worker holds is predicted.
    ///     OverflowError: a hash is no u64.
    #[pyo3(signature = (worker, *, stored = None, removed = None, cleared = false))]
    fn report(
        &self,
        py: Python<'_>,
        worker: &str,
        stored: Option<&Bound<'_, PyAny>>,
        removed: Option<&Bound<'_, PyAny>>,
        cleared: bool,
    ) -> PyResult<()> {
        let (stored, removed) = (hashes(stored)?, hashes(removed)?);
        self.with(py, |core| core.report(worker, cleared, &removed, &stored))?
            .map_err(|error| Error::from(error).into_py(py))
    }

    /// Hashes of the prompt's whole blocks with this router's root and block size, shape ``[tokens // block_size]``.
    fn hash_blocks(&self, prompt: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
        Ok(self.prompt(prompt)?.chain().iter().map(|hash| hash.0).collect())
    }

    /// What is believed of each worker, in the order of candidates.
    fn workers<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        static LOAD: Class = Class::new("scls_router._router", "WorkerLoad");
        let states: Vec<_> = self.with(py, |core| core.workers().collect())?;
        let fields = |state: router_core::WorkerState| {
            let capacity = state.capacity.map(|blocks| blocks.0);
            LOAD.of(py, (&*state.name, state.queued.0, state.batch_size, state.indexed.0, capacity))
        };
        states.into_iter().map(fields).collect()
    }

    /// As decisions have it.
    #[getter]
    fn policy(&self) -> &str {
        &self.policy_name
    }

    /// Tokens a block.
    #[getter]
    fn block_size(&self) -> u64 {
        self.size.get()
    }

    /// The root of all chains.
    #[getter]
    fn hash_root(&self) -> u64 {
        self.root.0
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let workers = self.with(py, |core| core.workers().count())?;
        Ok(format!("Router(policy={:?}, block_size={}, workers={workers})", self.policy_name, self.size.get()))
    }

    // A policy is often a method of the object that holds the router. There is no `__clear__`: such a cycle goes
    // through that object's attributes, which the collector clears.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.policy {
            Policy::Callable(policy) => visit.call(policy),
            Policy::Named(_) => Ok(()),
        }
    }
}

impl Router {
    /// Calls the core with the interpreter released: whoever waits for the lock never holds up who has it.
    fn with<T: Send>(&self, py: Python<'_>, call: impl FnOnce(&mut router_core::Router) -> T + Send) -> PyResult<T> {
        if *held(&self.deciding) == Some(thread::current().id()) {
            return Err(PyRuntimeError::new_err("a policy decides from its view alone: it called its own router"));
        }
        Ok(py.detach(|| {
            let mut core = held(&self.core);
            // inside the lock, so that times come in order
            core.advance(Micros(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)));
            call(&mut core)
        }))
    }

    fn prompt(&self, given: &Bound<'_, PyAny>) -> PyResult<Prompt> {
        let py = given.py();
        let ids = match (given.cast::<PyString>(), &self.tokenizer) {
            (Err(_), _) => ids(given)?,
            // Special tokens as completions of the server have them.
            (Ok(text), Some(tokenizer)) => {
                let text = text.to_str()?;
                let ids = py.detach(|| tokenizer.encode(text, true));
                ids.map_err(|error| PyValueError::new_err(error.to_string()))?
            }
            (Ok(_), None) => {
                return Err(PyValueError::new_err("a text needs a tokenizer: Router(tokenizer=\"…/tokenizer.json\")"));
            }
        };
        Ok(py.detach(|| Prompt::new(self.root, &ids, self.size)))
    }

    fn decide(&self, py: Python<'_>, prompts: Vec<Prompt>, commit: bool) -> PyResult<Vec<Decision>> {
        let choices: Result<Vec<Choice>, Error> = match &self.policy {
            Policy::Named(name) => self.with(py, |core| {
                let policy = name.policy(self.seed);
                core.route_many(prompts, commit, &mut |seen| {
                    Ok((0..seen.candidates.len()).map(|at| policy.score(seen.view(), at)).collect())
                })
            })?,
            Policy::Callable(policy) => self.with(py, |core| {
                *held(&self.deciding) = Some(thread::current().id());
                let choices = core.route_many(prompts, commit, &mut |seen| {
                    Python::attach(|py| ask(policy.bind(py), seen)).map_err(Error::from)
                });
                *held(&self.deciding) = None;
                choices
            })?,
        };
        let choices = choices.map_err(|error| error.into_py(py))?;
        let decision = |choice| {
            // its record is who was filtered
            let choice = Choice { guard: None, ..choice };
            Decision { choice, policy: Arc::clone(&self.policy_name), seed: self.seed }
        };
        Ok(choices.into_iter().map(decision).collect())
    }
}

fn read_policy(policy: &Bound<'_, PyAny>) -> PyResult<(Policy, Arc<str>)> {
    let py = policy.py();
    if let Ok(name) = policy.cast::<PyString>() {
        let name: PolicyName = name.to_str()?.parse().map_err(|error| unknown_policy(py, &error))?;
        if name == PolicyName::ProductTime {
            return Err(no_times(py));
        }
        return Ok((Policy::Named(name), Arc::from(name.as_str())));
    }
    if !policy.is_callable() {
        let kind = policy.get_type().name()?;
        return Err(PyTypeError::new_err(format!("a policy is a name or a callable: got {kind}")));
    }
    let name = match policy.getattr_opt("__qualname__")? {
        Some(name) => name.str()?,
        None => policy.get_type().qualname()?,
    };
    Ok((Policy::Callable(policy.clone().unbind()), Arc::from(format!("callable:{name}"))))
}

/// Asks a policy written in Python for its scores.
fn ask(policy: &Bound<'_, PyAny>, seen: &Seen) -> PyResult<Vec<u128>> {
    static VIEW: Class = Class::new("scls_router._router", "View");
    let py = policy.py();
    let all = PyTuple::new(py, candidates(py, seen)?)?;
    let view = VIEW.of(py, (seen.tokens.0, seen.turn, all))?;
    let scores = policy.call1((view,))?;
    let score = |(at, score): (usize, PyResult<Bound<'_, PyAny>>)| {
        let score = score?;
        score.extract::<u128>().map_err(|_| {
            let name = seen.names.get(at).map_or("none at all", |name| name);
            let message = format!("a score is an int from 0 to 2**128 - 1: got {score} for worker {name}");
            if score.is_instance_of::<pyo3::types::PyInt>() {
                PyValueError::new_err(message)
            } else {
                PyTypeError::new_err(message)
            }
        })
    };
    scores.try_iter()?.enumerate().map(score).collect()
}

fn committed(decision: &Decision) -> PyResult<DecisionId> {
    decision.choice.id.ok_or_else(|| PyValueError::new_err("a decision with commit=False moved nothing that could end"))
}

fn hashes(given: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<BlockHash>> {
    let Some(given) = given else { return Ok(Vec::new()) };
    given.try_iter()?.map(|hash| Ok(BlockHash(hash?.extract()?))).collect()
}

fn load(path: &Path) -> PyResult<Tokenizer> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
    let bytes = std::fs::read(&file).map_err(named)?;
    Tokenizer::from_json(&bytes).map_err(|error| PyValueError::new_err(format!("{}: {error}", file.display())))
}

/// The core changes nothing halfway, so what a panic left is whole.
pub(crate) fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
