//! How waiting rows are cut into batches: the dynamic programme over lengths of SCLS (arXiv 2406.13511), and the plain
//! cuts it is compared with.
//!
//! A padded batch costs as if all its rows were as long as its longest, so rows of like length belong together; but a
//! pass has a price of its own, so they should not be too few. Over rows sorted by length the cheapest cut into runs is
//! found exactly: `F[i] = min over n of F[i-n] + T(n, l_i, S)` for every `n` that memory and row limit allow. Where time and
//! memory never fall with length, no other partition is cheaper: of two batches the shorter rows may always be given to
//! the one with the shorter longest row, which then gets no longer and the other neither.

use crate::cost::{BatchLoad, CostModel, Layout, micros};
use crate::memory::{Ceiling, Extent};
use crate::units::{BlockSize, Blocks, Micros, Tokens};

/// What batches of a pool of like workers may be.
#[derive(Clone, Copy, Debug)]
pub struct Batcher {
    /// Times of batches. Its rows are prefilled whole: nothing is thought to be cached.
    pub model: CostModel,
    /// How memory is counted.
    pub layout: Layout,
    /// KV blocks of a worker.
    pub capacity: Blocks,
    /// Tokens a block.
    pub block_size: BlockSize,
    /// Most rows of a batch; none is taken for one.
    pub max_rows: u32,
    /// Most iterations (S).
    pub steps: u32,
}

/// Rows that run together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// Places in what was given.
    pub rows: Vec<usize>,
    /// The longest row.
    pub longest: Tokens,
    /// Most blocks it can need.
    pub ceiling: Blocks,
    /// Time of all S iterations if no row ends.
    pub time: Micros,
}

/// Every row once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// The batches, in order of the rows they were cut from.
    pub batches: Vec<RowGroup>,
    /// Rows that fit no batch, not even alone.
    pub infeasible: Vec<usize>,
}

/// A run of rows that grows.
#[derive(Clone, Copy)]
struct Run {
    memory: Ceiling,
    longest: Tokens,
    context: Tokens,
}

impl Run {
    fn with(self, row: Extent) -> Self {
        self.with_known(row.tokens, self.memory.one(row))
    }

    fn with_known(self, tokens: Tokens, ceiling: Blocks) -> Self {
        let (longest, context) = (self.longest.max(tokens), self.context + tokens);
        Self { memory: self.memory.with(ceiling), longest, context }
    }
}

/// The cheapest cut of a prefix of the sorted rows.
#[derive(Clone, Copy)]
struct Best {
    /// Nanoseconds: sums of whole numbers do not depend on their order, so ties are ties.
    nanos: u64,
    batches: usize,
    /// Rows of its last batch.
    last: usize,
}

impl Batcher {
    /// The cheapest batches of rows of these lengths, each of which may draw S tokens. Of equally cheap ones the fewest.
    /// `O(n * max_rows)` after sorting, and less where memory allows fewer rows.
    ///
    /// ```
    /// use router_core::{Batcher, BlockSize, Blocks, CostModel, Layout, Tokens};
    /// let batcher = Batcher {
    ///     model: CostModel::unknown(Layout::Padded),
    ///     layout: Layout::Padded,
    ///     capacity: Blocks(1000),
    ///     block_size: BlockSize::new(16).expect("not zero"),
    ///     max_rows: 8,
    ///     steps: 32,
    /// };
    /// let split = batcher.split(&[900, 20, 1000, 30].map(Tokens));
    /// let rows: Vec<_> = split.batches.iter().map(|batch| batch.rows.as_slice()).collect();
    /// assert_eq!(rows, [[1, 3], [0, 2]]);
    /// ```
    pub fn split(&self, lengths: &[Tokens]) -> Split {
        let rows: Vec<Extent> = lengths.iter().map(|&tokens| Extent { tokens, total: Tokens(u64::MAX) }).collect();
        self.split_rows(&rows)
    }

    /// The same for rows that have limits: one that may draw less than S tokens needs less memory. Exact among cuts of
    /// the sorted rows; where limits differ, memory no longer grows with length alone, and another partition may be cheaper.
    pub fn split_rows(&self, rows: &[Extent]) -> Split {
        let (order, infeasible) = self.sorted(rows);
        let start = Best { nanos: 0, batches: 0, last: 0 };
        // what a row needs is a division: once a row, not once a cell
        let memory = self.empty().memory;
        let sorted: Vec<_> = order.iter().map(|&at| (rows[at].tokens, memory.one(rows[at]))).collect();
        let mut best = Vec::with_capacity(order.len() + 1);
        best.push(start);
        for at in 0..sorted.len() {
            let mut run = self.empty();
            let mut chosen: Option<Best> = None;
            for first in (0..=at).rev() {
                run = run.with_known(sorted[first].0, sorted[first].1);
                if !self.fits(&run) {
                    // neither would any longer run
                    break;
                }
                let before: Best = best[first];
                let nanos = before.nanos.saturating_add(self.nanos(&run));
                let batches = before.batches + 1;
                if chosen.is_none_or(|best| (nanos, batches) < (best.nanos, best.batches)) {
                    chosen = Some(Best { nanos, batches, last: at + 1 - first });
                }
            }
            // a row alone fits: those that do not were taken out
            best.push(chosen.unwrap_or(Best { last: 1, ..start }));
        }
        let mut cuts = vec![order.len()];
        while let Some(&end @ 1..) = cuts.last() {
            cuts.push(end - best[end].last);
        }
        cuts.reverse();
        let batches = cuts.windows(2).map(|cut| self.group(rows, &order[cut[0]..cut[1]])).collect();
        Split { batches, infeasible }
    }

    /// Rows as they come, at most so many to a batch and never more than fit.
    pub fn in_order(&self, rows: &[Extent], most: u32) -> Split {
        let order = (0..rows.len()).collect();
        self.cut(rows, order, most)
    }

    /// Rows by length, at most so many to a batch and never more than fit.
    pub fn by_length(&self, rows: &[Extent], most: u32) -> Split {
        let (order, infeasible) = self.sorted(rows);
        Split { infeasible, ..self.cut(rows, order, most) }
    }

    fn cut(&self, rows: &[Extent], order: Vec<usize>, most: u32) -> Split {
        let mut split = Split::default();
        let (mut run, mut taken) = (self.empty(), Vec::new());
        for at in order {
            if !self.fits(&self.empty().with(rows[at])) {
                split.infeasible.push(at);
                continue;
            }
            let longer = run.with(rows[at]);
            if taken.len() >= most.max(1) as usize || !self.fits(&longer) {
                split.batches.push(self.group(rows, &std::mem::take(&mut taken)));
                run = self.empty().with(rows[at]);
            } else {
                run = longer;
            }
            taken.push(at);
        }
        if !taken.is_empty() {
            split.batches.push(self.group(rows, &taken));
        }
        split
    }

    /// By length, then as they came; and those that fit nowhere.
    fn sorted(&self, rows: &[Extent]) -> (Vec<usize>, Vec<usize>) {
        let alone = |at: &usize| self.fits(&self.empty().with(rows[*at]));
        let (mut order, infeasible): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(alone);
        order.sort_unstable_by_key(|&at| (rows[at].tokens, at));
        (order, infeasible)
    }

    fn group(&self, rows: &[Extent], at: &[usize]) -> RowGroup {
        let run = at.iter().fold(self.empty(), |run, at| run.with(rows[*at]));
        let time = micros(self.model.slice(&load(&run), u64::from(self.steps)));
        RowGroup { rows: at.to_vec(), longest: run.longest, ceiling: run.memory.blocks(), time }
    }

    fn empty(&self) -> Run {
        let memory = Ceiling::new(self.layout, self.block_size, self.steps);
        Run { memory, longest: Tokens::ZERO, context: Tokens::ZERO }
    }

    fn fits(&self, run: &Run) -> bool {
        run.memory.rows() <= u64::from(self.max_rows.max(1)) && run.memory.blocks() <= self.capacity
    }

    fn nanos(&self, run: &Run) -> u64 {
        // a cast saturates
        (self.model.slice(&load(run), u64::from(self.steps)) * 1e9) as u64
    }
}

fn load(run: &Run) -> BatchLoad {
    BatchLoad { rows: run.memory.rows(), longest: run.longest, context: run.context, uncached: run.context }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::PaddedCost;
    use crate::memory::batch_ceiling;
    use crate::memory::tests::{Dice, cases};

    fn cost(dice: &mut Dice) -> PaddedCost {
        // a third of the coefficients is zero, so that ties are common
        let mut one = |scale: f64| if dice.chance(33) { 0.0 } else { dice.below(1000) as f64 * scale };
        PaddedCost { constant: one(1e-4), per_row: one(1e-5), per_position: one(1e-6), per_cell: one(1e-7) }
    }

    fn batcher(dice: &mut Dice) -> Batcher {
        Batcher {
            model: CostModel::Padded { prefill: cost(dice), step: cost(dice) },
            layout: Layout::Padded,
            capacity: Blocks(5 + dice.below(200)),
            block_size: BlockSize::new(1 + dice.below(32) as u32).expect("not zero"),
            max_rows: 1 + dice.below(8) as u32,
            steps: 1 + dice.below(130) as u32,
        }
    }

    /// Least (time, batches) over all partitions, however mixed: every set of rows costs what it costs, and the best
    /// partition of a set has a part with its first row.
    fn brute_force(batcher: &Batcher, lengths: &[Tokens]) -> (u64, usize) {
        let all = 1usize << lengths.len();
        let cost: Vec<Option<u64>> = (0..all)
            .map(|set| {
                let rows = (0..lengths.len()).filter(|at| set >> at & 1 == 1);
                let extents = rows.map(|at| Extent { tokens: lengths[at], total: Tokens(u64::MAX) });
                let run = extents.fold(batcher.empty(), Run::with);
                batcher.fits(&run).then(|| batcher.nanos(&run))
            })
            .collect();
        let mut best = vec![(0, 0); all];
        for set in 1..all {
            let lowest = set & set.wrapping_neg();
            let rest = set ^ lowest;
            let (mut part, mut least) = (rest, (u64::MAX, usize::MAX));
            loop {
                let chosen = part | lowest;
                if let Some(cost) = cost[chosen] {
                    let (time, parts): (u64, usize) = best[set ^ chosen];
                    least = least.min((time + cost, parts + 1));
                }
                if part == 0 {
                    break;
                }
                part = (part - 1) & rest;
            }
            best[set] = least;
        }
        best[all - 1]
    }

    #[test]
    fn property_6_no_partition_is_cheaper() {
        for case in 0..10_000 {
            let mut dice = Dice(case);
            let batcher = batcher(&mut dice);
            let spread = 1 + dice.below(300);
            let lengths: Vec<Tokens> = (0..dice.below(9)).map(|_| Tokens(1 + dice.below(spread))).collect();
            let split = batcher.split(&lengths);
            let feasible: Vec<Tokens> =
                (0..lengths.len()).filter(|at| !split.infeasible.contains(at)).map(|at| lengths[at]).collect();
            let nanos = |batch: &RowGroup| {
                let rows = batch.rows.iter().map(|&at| Extent { tokens: lengths[at], total: Tokens(u64::MAX) });
                batcher.nanos(&rows.fold(batcher.empty(), Run::with))
            };
            let found = (split.batches.iter().map(nanos).sum(), split.batches.len());
            assert_eq!(found, brute_force(&batcher, &feasible), "case {case}: {batcher:?} {lengths:?}");
        }
    }

    /// Whatever the cut: every row once, no batch past its memory or rows, and only rows that cannot run alone are left.
    #[test]
    fn every_row_is_in_one_batch_that_fits() {
        for case in 0..cases(2_000, 100_000) {
            let mut dice = Dice(case ^ 0xBA7C);
            let mut batcher = batcher(&mut dice);
            if dice.chance(50) {
                batcher.layout = Layout::Paged;
                batcher.model = CostModel::unknown(Layout::Paged);
            }
            let rows: Vec<Extent> = (0..dice.below(40))
                .map(|_| {
                    let tokens = 1 + dice.below(300);
                    Extent { tokens: Tokens(tokens), total: Tokens(tokens + dice.below(300)) }
                })
                .collect();
            let most = 1 + dice.below(20) as u32;
            for split in [batcher.split_rows(&rows), batcher.in_order(&rows, most), batcher.by_length(&rows, most)] {
                let mut seen: Vec<usize> =
                    split.batches.iter().flat_map(|batch| batch.rows.clone()).chain(split.infeasible.clone()).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..rows.len()).collect::<Vec<_>>(), "case {case}");
                for batch in &split.batches {
                    let members: Vec<Extent> = batch.rows.iter().map(|at| rows[*at]).collect();
                    let ceiling = batch_ceiling(batcher.layout, &members, batcher.steps, batcher.block_size);
                    assert_eq!(batch.ceiling, ceiling, "case {case}");
                    assert!(!members.is_empty() && ceiling <= batcher.capacity, "case {case}: {batch:?}");
                    assert!(members.len() <= batcher.max_rows as usize, "case {case}: {batch:?}");
                    assert_eq!(Some(batch.longest), members.iter().map(|row| row.tokens).max(), "case {case}");
                }
                for at in split.infeasible {
                    let alone = batch_ceiling(batcher.layout, &[rows[at]], batcher.steps, batcher.block_size);
                    assert!(alone > batcher.capacity, "case {case}: row {at}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_a_model_is_no_panic() {
        let bad = PaddedCost { constant: f64::NAN, per_row: f64::INFINITY, per_position: -1.0, per_cell: 1e300 };
        let batcher = Batcher {
            model: CostModel::Padded { prefill: bad, step: bad },
            layout: Layout::Padded,
            capacity: Blocks(u64::MAX),
            block_size: BlockSize::new(1).expect("not zero"),
            max_rows: 0,
            steps: u32::MAX,
        };
        let split = batcher.split(&[Tokens(u64::MAX), Tokens(0), Tokens(7)]);
        assert_eq!(split.batches.len(), 3, "no rows of a batch is taken for one");
        assert!(batcher.split(&[]).batches.is_empty());
    }

    #[test]
    fn fcfs_keeps_the_order_and_sorted_does_not() {
        let mut dice = Dice(1);
        let batcher = Batcher { capacity: Blocks(1 << 20), max_rows: 64, ..batcher(&mut dice) };
        let rows = [50, 10, 40, 20, 30].map(|tokens| Extent { tokens: Tokens(tokens), total: Tokens(1000) });
        let groups = |split: Split| split.batches.into_iter().map(|batch| batch.rows).collect::<Vec<_>>();
        assert_eq!(groups(batcher.in_order(&rows, 2)), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(groups(batcher.by_length(&rows, 2)), [vec![1, 3], vec![4, 2], vec![0]]);
    }
}
