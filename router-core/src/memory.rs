//! Memory known before it is used: the most blocks a batch can come to hold, whichever of its rows end early.
//!
//! A ceiling counts no sharing and no early end, so it holds for every end-of-sequence pattern and every cached prefix
//! (arXiv 2406.13511, memory estimation; counted here in whole blocks).

use crate::cost::Layout;
use crate::units::{BlockSize, Blocks, Tokens};

/// A row's length: now, and at its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Prompt and output so far.
    pub tokens: Tokens,
    /// Prompt and output at its limit.
    pub total: Tokens,
}

/// Blocks a row can need in a slice of `steps` iterations that it enters with at most `tokens` tokens of the `total`
/// it may reach. The last token drawn is not computed before the next step, so its KV needs no place yet.
pub fn ceiling(tokens: Tokens, steps: Tokens, total: Tokens, size: BlockSize) -> Blocks {
    (tokens + steps).min(total).saturating_sub(Tokens(1)).blocks(size)
}

/// The ceiling of a batch that grows row by row, in O(1) a row.
#[derive(Clone, Copy, Debug)]
pub struct Ceiling {
    layout: Layout,
    size: BlockSize,
    steps: Tokens,
    rows: u64,
    highest: Blocks,
    sum: Blocks,
}

impl Ceiling {
    /// Of a batch of no rows over `steps` iterations.
    pub fn new(layout: Layout, size: BlockSize, steps: u32) -> Self {
        let (highest, sum) = (Blocks::ZERO, Blocks::ZERO);
        Self { layout, size, steps: Tokens(u64::from(steps)), rows: 0, highest, sum }
    }

    /// The ceiling of a row in it.
    pub fn one(&self, row: Extent) -> Blocks {
        ceiling(row.tokens, self.steps, row.total, self.size)
    }

    /// The same with one row more, whose ceiling is this.
    #[must_use]
    pub fn with(mut self, one: Blocks) -> Self {
        self.rows += 1;
        self.highest = self.highest.max(one);
        self.sum += one;
        self
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Most blocks in use at once: paged, the sum over the rows; padded, as many rows of the longest that any can get.
    pub fn blocks(&self) -> Blocks {
        match self.layout {
            Layout::Paged => self.sum,
            Layout::Padded => Blocks(self.highest.0.saturating_mul(self.rows)),
        }
    }
}

/// The ceiling of a batch of these rows over `steps` iterations.
///
/// ```
/// use router_core::{BlockSize, Blocks, Extent, Layout, Tokens, batch_ceiling};
/// let size = BlockSize::new(16).expect("not zero");
/// let rows = [30, 100].map(|tokens| Extent { tokens: Tokens(tokens), total: Tokens(1000) });
/// // 30 + 32 - 1 and 100 + 32 - 1 positions: 4 and 9 blocks
/// assert_eq!(batch_ceiling(Layout::Paged, &rows, 32, size), Blocks(13));
/// assert_eq!(batch_ceiling(Layout::Padded, &rows, 32, size), Blocks(18));
/// ```
pub fn batch_ceiling(layout: Layout, rows: &[Extent], steps: u32, size: BlockSize) -> Blocks {
    rows.iter().fold(Ceiling::new(layout, size, steps), |all, row| all.with(all.one(*row))).blocks()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A seeded sequence (`SplitMix64`): the same cases every time, on every machine.
    pub(crate) struct Dice(pub(crate) u64);

    impl Dice {
        pub(crate) fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            (x ^ (x >> 31)) % n.max(1)
        }

        pub(crate) fn chance(&mut self, percent: u64) -> bool {
            self.below(100) < percent
        }
    }

    /// Cases of a loop: many with `SCLS_SOAK` in the environment.
    pub(crate) fn cases(few: u64, many: u64) -> u64 {
        if std::env::var_os("SCLS_SOAK").is_some() { many } else { few }
    }

    #[derive(Clone)]
    struct Row {
        tokens: u64,
        total: u64,
        computed: u64,
        /// Tokens it draws before an eos; past its limit: none.
        eos: u64,
        drawn: u64,
        blocks: u64,
    }

    impl Row {
        fn ended(&self) -> bool {
            self.drawn >= self.eos || self.tokens >= self.total
        }

        fn extent(&self) -> Extent {
            Extent { tokens: Tokens(self.tokens), total: Tokens(self.total) }
        }
    }

    /// Rows share the chunk in order, decode once they are prefilled, and leave with their blocks when they end. Blocks
    /// are taken when they are written. The most in use at once.
    fn run_paged(mut rows: Vec<Row>, chunk: u64, steps: u64, size: u64) -> u64 {
        let mut peak = 0;
        for _ in 0..steps {
            let mut budget = chunk;
            for row in rows.iter_mut().filter(|row| !row.ended()) {
                let want = row.tokens - row.computed;
                let now = if want == 1 { 1 } else { want.min(budget) };
                budget = budget.saturating_sub(if want == 1 { 0 } else { now });
                row.computed += now;
                row.blocks = row.blocks.max(row.computed.div_ceil(size));
            }
            peak = peak.max(rows.iter().map(|row| row.blocks).sum());
            for row in rows.iter_mut().filter(|row| row.computed == row.tokens && !row.ended()) {
                row.tokens += 1;
                row.drawn += 1;
                if row.ended() {
                    row.blocks = 0;
                }
            }
        }
        peak
    }

    /// One rectangle: all prompts in the first iteration, then a position each; it ends with its last row, and what an
    /// ended row is computed for needs no place beyond the longest that goes on.
    fn run_padded(mut rows: Vec<Row>, steps: u64, size: u64) -> u64 {
        let count = rows.len() as u64;
        let mut peak = 0;
        for _ in 0..steps {
            if rows.iter().all(Row::ended) {
                break;
            }
            let written = rows.iter().map(|row| if row.ended() { row.tokens - 1 } else { row.tokens }).max();
            peak = peak.max(count * written.unwrap_or(0).div_ceil(size));
            for row in rows.iter_mut().filter(|row| !row.ended()) {
                row.tokens += 1;
                row.drawn += 1;
            }
        }
        peak
    }

    fn random_rows(dice: &mut Dice, size: u64, steps: u64, ends: bool) -> Vec<Row> {
        (0..=dice.below(12))
            .map(|_| {
                let tokens = 1 + dice.below(200);
                let left = 1 + dice.below(2 * steps);
                let left = if ends { left } else { left + steps };
                // whole blocks, and never the last token
                let cached = dice.below((tokens - 1) / size + 1) * size;
                let held = dice.chance(30);
                let computed = if held { tokens - 1 } else { cached };
                let eos = if ends && dice.chance(50) { 1 + dice.below(steps) } else { u64::MAX };
                Row { tokens, total: tokens + left, computed, eos, drawn: 0, blocks: computed.div_ceil(size) }
            })
            .collect()
    }

    #[test]
    fn property_8_no_batch_passes_its_ceiling_and_one_in_which_nobody_ends_reaches_it() {
        for case in 0..cases(2_000, 100_000) {
            let mut dice = Dice(case);
            let size = 1 + dice.below(20);
            let steps = 1 + dice.below(60);
            let block = BlockSize::new(size as u32).expect("not zero");
            for ends in [true, false] {
                let rows = random_rows(&mut dice, size, steps, ends);
                let extents: Vec<Extent> = rows.iter().map(Row::extent).collect();
                let most = |layout| batch_ceiling(layout, &extents, steps as u32, block).0;
                let chunk = 1 + dice.below(300);
                let cut = 1 + dice.below(steps);
                for (chunk, steps) in [(chunk, steps), (u64::MAX, steps), (chunk, cut)] {
                    let peak = run_paged(rows.clone(), chunk, steps, size);
                    assert!(peak <= most(Layout::Paged), "case {case}: {peak} of {}", most(Layout::Paged));
                }
                let peak = run_padded(rows.clone(), steps, size);
                assert!(peak <= most(Layout::Padded), "case {case}: {peak} of {}", most(Layout::Padded));
                if !ends {
                    assert_eq!(peak, most(Layout::Padded), "case {case}: padded");
                    let full = run_paged(rows.clone(), u64::MAX, steps, size);
                    assert!(full + rows.len() as u64 >= most(Layout::Paged), "case {case}: {full}");
                    assert_eq!(
                        full,
                        most(Layout::Paged),
                        "case {case}: prefill in one iteration leaves no slack at all"
                    );
                }
            }
        }
    }

    #[test]
    fn extremes_saturate() {
        let size = BlockSize::new(1).expect("not zero");
        let row = Extent { tokens: Tokens(u64::MAX), total: Tokens(u64::MAX) };
        for layout in [Layout::Paged, Layout::Padded] {
            assert_eq!(batch_ceiling(layout, &[row; 3], u32::MAX, size), Blocks(u64::MAX), "{layout:?}");
            assert_eq!(batch_ceiling(layout, &[], 9, size), Blocks::ZERO);
        }
        let empty = Extent { tokens: Tokens(0), total: Tokens(0) };
        assert_eq!(batch_ceiling(Layout::Paged, &[empty], 9, size), Blocks::ZERO);
    }
}
