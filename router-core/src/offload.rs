//! Which worker a batch goes to: max-min of SCLS (arXiv 2406.13511), the longest batch first, each to the worker that has
//! least to do.
//!
//! From equal loads the last worker is done within `4/3 - 1/(3m)` of the best that is possible on `m` workers, and from any
//! loads within `2 - 1/m` (Graham 1969).

use std::cmp::Reverse;

use crate::units::Micros;

/// Committed time of each worker.
#[derive(Clone, Debug, Default)]
pub struct Offloader {
    loads: Vec<Micros>,
    /// Where the search for the least load begins: rotates, or ties would pile up on the first worker.
    turn: usize,
}

impl Offloader {
    /// Workers that have this much to do.
    pub fn new(loads: Vec<Micros>) -> Self {
        Self { loads, turn: 0 }
    }

    /// The same, with ties broken from this turn on.
    #[must_use]
    pub fn at_turn(mut self, turn: usize) -> Self {
        self.turn = turn % self.loads.len().max(1);
        self
    }

    /// Whose turn it is.
    pub fn turn(&self) -> usize {
        self.turn
    }

    /// What each worker has to do.
    pub fn loads(&self) -> &[Micros] {
        &self.loads
    }

    /// Gives each batch a worker and adds its time there, the longest first. Empty where there is no worker.
    ///
    /// ```
    /// use router_core::{Micros, Offloader};
    /// let mut offloader = Offloader::new(vec![Micros(0); 2]);
    /// assert_eq!(offloader.assign(&[2, 3, 2, 3].map(Micros)), [0, 0, 1, 1]);
    /// assert_eq!(offloader.loads(), [5, 5].map(Micros));
    /// ```
    pub fn assign(&mut self, times: &[Micros]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..times.len()).collect();
        order.sort_by_key(|&at| (Reverse(times[at]), at));
        let mut workers = vec![0; times.len()];
        for at in order {
            let Some(worker) = self.least(|_| true) else { return Vec::new() };
            workers[at] = worker;
            self.add(worker, times[at]);
        }
        workers
    }

    /// The least loaded of the workers that may be taken.
    pub fn least(&mut self, may: impl Fn(usize) -> bool) -> Option<usize> {
        let n = self.loads.len();
        let chosen = (self.turn..n).chain(0..self.turn).filter(|&at| may(at)).min_by_key(|&at| self.loads[at])?;
        self.turn = (chosen + 1) % n;
        Some(chosen)
    }

    /// The next in turn of the workers that may be taken, whatever they have to do.
    pub fn next(&mut self, may: impl Fn(usize) -> bool) -> Option<usize> {
        let n = self.loads.len();
        let chosen = (self.turn..n).chain(0..self.turn).find(|&at| may(at))?;
        self.turn = (chosen + 1) % n;
        Some(chosen)
    }

    /// A worker is given work.
    pub fn add(&mut self, worker: usize, time: Micros) {
        if let Some(load) = self.loads.get_mut(worker) {
            *load += time;
        }
    }

    /// Work is done or given up: exactly what was added is taken back, not what it took, so that loads end at zero.
    pub fn done(&mut self, worker: usize, time: Micros) {
        if let Some(load) = self.loads.get_mut(worker) {
            *load = load.saturating_sub(time);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least makespan over all assignments.
    fn optimum(loads: &mut [u64], times: &[u64]) -> u64 {
        let Some((first, rest)) = times.split_first() else { return loads.iter().copied().max().unwrap_or(0) };
        let mut best = u64::MAX;
        for at in 0..loads.len() {
            if loads[..at].contains(&loads[at]) {
                continue;
            }
            loads[at] += first;
            best = best.min(optimum(loads, rest));
            loads[at] -= first;
        }
        best
    }

    fn makespan(start: &[u64], times: &[u64]) -> u64 {
        let mut offloader = Offloader::new(start.iter().copied().map(Micros).collect());
        offloader.assign(&times.iter().copied().map(Micros).collect::<Vec<_>>());
        offloader.loads().iter().map(|load| load.0).max().unwrap_or(0)
    }

    #[test]
    fn graham_s_worst_case_for_two_workers_is_met_exactly() {
        // 7/6: 3 3 | 2 2 2 is best
        assert_eq!((makespan(&[0, 0], &[3, 3, 2, 2, 2]), optimum(&mut [0, 0], &[3, 3, 2, 2, 2])), (7, 6));
    }

    #[test]
    fn ties_rotate() {
        let mut offloader = Offloader::new(vec![Micros::ZERO; 3]).at_turn(5);
        let zero = [Micros::ZERO; 4];
        assert_eq!(offloader.assign(&zero), [2, 0, 1, 2]);
        assert_eq!(offloader.assign(&zero), [0, 1, 2, 0]);
        assert_eq!(Offloader::default().at_turn(3).assign(&zero), Vec::<usize>::new());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
        #[test]
        fn property_7_lpt_stays_within_graham_s_bounds(
            times in proptest::collection::vec(1u64..30, 0..9),
            start in proptest::collection::vec(0u64..40, 1..5),
        ) {
            let m = start.len() as u64;
            let equal = vec![7; start.len()];
            // from equal loads: those are no part of what is compared
            let (lpt, best) = (makespan(&equal, &times) - 7, optimum(&mut equal.clone(), &times) - 7);
            prop_assert!(3 * m * lpt <= (4 * m - 1) * best, "{lpt} of {best}");
            let (lpt, best) = (makespan(&start, &times), optimum(&mut start.clone(), &times));
            prop_assert!(m * lpt <= (2 * m - 1) * best, "{lpt} of {best}");
        }

        #[test]
        fn what_is_done_leaves_nothing(
            times in proptest::collection::vec(0u64..u64::MAX / 64, 0..40), workers in 1usize..6, turn: usize,
        ) {
            let times: Vec<Micros> = times.into_iter().map(Micros).collect();
            let mut offloader = Offloader::new(vec![Micros::ZERO; workers]).at_turn(turn);
            let to = offloader.assign(&times);
            for (worker, time) in to.into_iter().zip(&times) {
                offloader.done(worker, *time);
            }
            offloader.done(workers, Micros(1));
            prop_assert_eq!(offloader.loads(), vec![Micros::ZERO; workers]);
        }
    }
}
