//! Which worker a batch goes to: max-min of SCLS (arXiv 2406.13511), the longest batch first, each to the worker that has
//! least to do; and the moves that pay where loads have drifted apart.
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

/// Work that has not started and may go elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Movable {
    /// Where it is.
    pub worker: usize,
    /// Its time on every worker: where it is, what was added there; elsewhere with the price of the hits it loses.
    pub times: Vec<Micros>,
}

/// Work that goes elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Its place in what was given.
    pub item: usize,
    /// From this worker.
    pub from: usize,
    /// To this one.
    pub to: usize,
    /// Time it takes there beyond what it took here.
    pub price: Micros,
}

/// Moves work from the most to the least loaded worker while they are more than `theta` apart (the time of a slice: less
/// is noise) and both are below the former maximum afterwards. Of several the move that leaves the lower maximum, then
/// the cheaper. An item moves once: its times are as seen from where it was. `loads` are those after the moves.
pub fn rebalance(loads: &mut [Micros], items: &[Movable], theta: Micros) -> Vec<Move> {
    let mut moves: Vec<Move> = Vec::new();
    let mut gone = vec![false; items.len()];
    loop {
        let most = (0..loads.len()).min_by_key(|&at| (Reverse(loads[at]), at));
        let least = (0..loads.len()).min_by_key(|&at| (loads[at], at));
        let (Some(from), Some(to)) = (most, least) else { return moves };
        if loads[from].saturating_sub(loads[to]) <= theta {
            return moves;
        }
        let ends = |item: &Movable| {
            let (here, there) = (*item.times.get(from)?, *item.times.get(to)?);
            // what a worker has not is not taken from it
            let ends = (loads[from].checked_sub(here)?, loads[to] + there);
            (ends.0.max(ends.1) < loads[from]).then_some((ends, there.saturating_sub(here)))
        };
        let best = (0..items.len())
            .filter(|&at| !gone[at] && items[at].worker == from)
            .filter_map(|at| ends(&items[at]).map(|(ends, price)| (ends.0.max(ends.1), price, at, ends)))
            .min();
        let Some((_, price, item, ends)) = best else { return moves };
        (loads[from], loads[to]) = ends;
        gone[item] = true;
        moves.push(Move { item, from, to, price });
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

    #[test]
    fn what_would_gain_nothing_stays() {
        let item = |worker, times: [u64; 2]| Movable { worker, times: times.map(Micros).to_vec() };
        let moved = |loads: [u64; 2], items: &[Movable], theta| {
            let mut loads = loads.map(Micros);
            let moves = rebalance(&mut loads, items, Micros(theta));
            (moves.iter().map(|m| (m.item, m.price.0)).collect::<Vec<_>>(), loads.map(|load| load.0))
        };
        // 10 and 0: an item of 4 goes for 5 there
        assert_eq!(moved([10, 0], &[item(0, [4, 5])], 2), (vec![(0, 1)], [6, 5]));
        // not for 10, not within theta, and not from where it is not
        assert_eq!(moved([10, 0], &[item(0, [4, 10])], 2).0, []);
        assert_eq!(moved([10, 0], &[item(0, [4, 5])], 10).0, []);
        assert_eq!(moved([10, 0], &[item(1, [4, 5])], 2).0, []);
        // of two the one that leaves them more even
        assert_eq!(moved([10, 0], &[item(0, [1, 1]), item(0, [5, 5])], 2), (vec![(1, 0)], [5, 5]));
        assert_eq!(moved([10, 0], &[Movable { worker: 0, times: vec![] }], 2).0, []);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
        #[test]
        fn lpt_stays_within_graham_s_bounds(
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

        /// The maximum never grows, every move is of an item once from where it is, and loads are what was there, less
        /// what left, plus what came at its price.
        #[test]
        fn moves_never_raise_the_maximum(
            items in proptest::collection::vec((0usize..5, 0u64..100, 0u64..30), 0..30),
            base in proptest::collection::vec(0u64..100, 5), theta in 0u64..50,
        ) {
            let mut loads: Vec<Micros> = base.into_iter().map(Micros).collect();
            let items: Vec<Movable> = items.into_iter().map(|(worker, time, price)| {
                loads[worker] += Micros(time);
                let there = |at| Micros(if at == worker { time } else { time + price });
                Movable { worker, times: (0..5).map(there).collect() }
            }).collect();
            let before = loads.clone();
            let moves = rebalance(&mut loads, &items, Micros(theta));
            prop_assert!(loads.iter().max() <= before.iter().max());
            prop_assert!(moves.len() <= items.len());
            let mut again = before.clone();
            let mut seen = vec![false; items.len()];
            for Move { item, from, to, price } in moves {
                prop_assert!(!std::mem::replace(&mut seen[item], true));
                prop_assert_eq!(from, items[item].worker);
                let most = again.iter().max().copied().unwrap_or_default();
                again[from] = again[from].saturating_sub(items[item].times[from]);
                again[to] += items[item].times[from] + price;
                prop_assert!(again[from].max(again[to]) < most);
            }
            prop_assert_eq!(loads, again);
        }
    }
}
