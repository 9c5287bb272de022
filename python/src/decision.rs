//! A decision as Python has it: a record whose candidates become objects only when they are asked for.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple, PyType};
use router_core::{Anticipation, Candidate, Choice, DecisionId, PolicyName, Seen, Tokens, WorkerId, choose, least};

use crate::class::Class;

/// Where a prompt goes, with all that was known when it was decided. Immutable, comparable, picklable.
///
/// Made by `Router.route` and `Router.route_many`.
#[pyclass(frozen, eq, module = "scls_router")]
#[derive(PartialEq)]
pub(crate) struct Decision {
    pub(crate) choice: Choice,
    pub(crate) policy: Arc<str>,
    pub(crate) seed: u64,
}

#[pymethods]
impl Decision {
    #[new]
    #[pyo3(signature = (id, policy, seed, turn, tokens, worker, candidates, scores, anticipation = (0.0, 0.0), filtered = Vec::new()))]
    #[allow(clippy::too_many_arguments)] // a record: all of it is given, by name or by a pickle
    fn new(
        id: Option<u64>,
        policy: &str,
        seed: u64,
        turn: u64,
        tokens: u64,
        worker: &str,
        candidates: Vec<(String, u64, u64, u64)>,
        scores: Vec<u128>,
        anticipation: (f64, f64),
        filtered: Vec<String>,
    ) -> PyResult<Self> {
        let at = candidates.iter().position(|(name, ..)| name == worker);
        let at = at.filter(|_| scores.len() == candidates.len()).ok_or_else(|| {
            PyValueError::new_err("a decision's worker is one of its candidates, and each of those has a score")
        })?;
        let names = candidates.iter().map(|(name, ..)| Arc::from(name.as_str())).collect();
        let candidates = (0..).zip(candidates).map(|(slot, (name, new, queued, batch_size))| Candidate {
            worker: WorkerId(slot),
            new_tokens: Tokens(new),
            queued: Tokens(queued),
            batch_size,
            filtered: filtered.contains(&name),
            ..Candidate::default()
        });
        let anticipation = Anticipation::new(anticipation.0, anticipation.1);
        let view = Seen { tokens: Tokens(tokens), turn, candidates: candidates.collect(), names, anticipation };
        let choice = Choice { id: id.map(DecisionId), seen: view, scores, at, guard: None };
        Ok(Self { choice, policy: Arc::from(policy), seed })
    }

    /// Its name in this router; None if it was asked for with ``commit=False``.
    #[getter]
    fn id(&self) -> Option<u64> {
        self.choice.id.map(|id| id.0)
    }

    /// Name of the policy; ``callable:NAME`` for one written in Python.
    #[getter]
    fn policy(&self) -> &str {
        &self.policy
    }

    /// The router's seed, which ``random`` draws from.
    #[getter]
    fn seed(&self) -> u64 {
        self.seed
    }

    /// Decisions made before this one: where ties begin to be broken.
    #[getter]
    fn turn(&self) -> u64 {
        self.choice.seen.turn
    }

    /// Of the prompt.
    #[getter]
    fn tokens(&self) -> u64 {
        self.choice.seen.tokens.0
    }

    /// What ``product_anticipating`` expects: arrivals a second at each worker, and seconds of prefill a token.
    #[getter]
    fn anticipation(&self) -> (f64, f64) {
        let expected = self.choice.seen.anticipation;
        (expected.arrivals_a_second(), expected.seconds_a_token())
    }

    /// Workers that the hotspot guard kept it from, whatever their scores: they hold a prefix that too many prompts begin with.
    #[getter]
    fn filtered(&self) -> Vec<&str> {
        let all = self.choice.seen.candidates.iter().zip(&*self.choice.seen.names);
        all.filter(|(candidate, _)| candidate.filtered).map(|(_, name)| &**name).collect()
    }

    /// Who gets it.
    #[getter]
    fn worker(&self) -> &str {
        self.choice.worker()
    }

    /// Tokens of the prompt that the worker has to compute, at least 1.
    #[getter]
    fn new_tokens(&self) -> u64 {
        self.choice.chosen().new_tokens.0
    }

    /// Tokens of the prompt that the worker is believed to hold, or to hold soon.
    #[getter]
    fn cached_tokens(&self) -> u64 {
        self.tokens().saturating_sub(self.new_tokens())
    }

    /// New tokens on their way to the worker before this decision.
    #[getter]
    fn queued_tokens(&self) -> u64 {
        self.choice.chosen().queued.0
    }

    /// Decisions for the worker that had not ended before this one.
    #[getter]
    fn batch_size(&self) -> u64 {
        self.choice.chosen().batch_size
    }

    /// The winner's.
    #[getter]
    fn score(&self) -> u128 {
        self.choice.scores[self.choice.at]
    }

    /// Of each candidate; the smallest of those that are not ``filtered`` wins.
    #[getter]
    fn scores(&self) -> Vec<u128> {
        self.choice.scores.clone()
    }

    /// All workers as they were, in the order of ``scores``.
    #[getter]
    fn candidates<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, candidates(py, &self.choice.seen)?)
    }

    /// The worker, chosen again from this record alone (for a policy written in Python: from its scores).
    ///
    /// >>> Decision(None, "product", 0, 0, 32, "b", [("a", 32, 0, 1), ("b", 32, 0, 0)], [64, 32]).recompute()
    /// 'b'
    fn recompute(&self) -> &str {
        let view = self.choice.seen.view();
        let at = match self.policy.parse::<PolicyName>() {
            Ok(name) => choose(&*name.policy(self.seed), view, &mut Vec::new()),
            Err(_) => least(view, &self.choice.scores),
        };
        &self.choice.seen.names[at.unwrap_or(self.choice.at)]
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyType>, Bound<'py, PyTuple>)> {
        let seen = &self.choice.seen;
        let candidates: Vec<_> = seen.candidates.iter().zip(&*seen.names).map(|(c, name)| plain(c, name)).collect();
        let (id, policy, worker, scores) = (self.id(), self.policy(), self.worker(), self.scores());
        let (expected, filtered) = (self.anticipation(), self.filtered());
        let fields = (id, policy, self.seed, seen.turn, seen.tokens.0, worker, candidates, scores, expected, filtered);
        Ok((py.get_type::<Self>(), fields.into_pyobject(py)?))
    }

    fn __repr__(&self) -> String {
        let id = self.id().map_or_else(|| "None".to_owned(), |id| id.to_string());
        format!(
            "Decision(worker={:?}, new_tokens={}, cached_tokens={}, batch_size={}, score={}, policy={:?}, id={id})",
            self.worker(),
            self.new_tokens(),
            self.cached_tokens(),
            self.batch_size(),
            self.score(),
            self.policy(),
        )
    }
}

fn plain<'a>(candidate: &Candidate, name: &'a Arc<str>) -> (&'a str, u64, u64, u64) {
    (&**name, candidate.new_tokens.0, candidate.queued.0, candidate.batch_size)
}

/// The candidates as `scls_router.Candidate`s.
pub(crate) fn candidates<'py>(py: Python<'py>, seen: &Seen) -> PyResult<Vec<Bound<'py, PyAny>>> {
    static CANDIDATE: Class = Class::new("scls_router._router", "Candidate");
    seen.candidates.iter().zip(&*seen.names).map(|(candidate, name)| CANDIDATE.of(py, plain(candidate, name))).collect()
}
