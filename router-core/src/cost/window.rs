//! The last residuals of a worker, in the order they came and in the order of their size.

use crate::constants::{FEW, RESIDUALS, TAIL, TAIL_DEVIATIONS};

/// The last [`RESIDUALS`] of a stream of ratios. Insertion is a binary search and a move of at most 4 kB; once full it
/// allocates no more.
#[derive(Clone, Debug, Default)]
pub(super) struct Window {
    /// Oldest at `next` once full. Four bytes each: there are eight windows a worker, and six digits are plenty.
    ring: Vec<f32>,
    next: usize,
    sorted: Vec<f32>,
    /// Mean of the logarithms and the sum of their squared deviations, while the window is filled.
    mean: f64,
    squares: f64,
}

impl Window {
    /// Takes a ratio in; what is no ratio is taken as the nearest one.
    pub(super) fn push(&mut self, ratio: f64) {
        let ratio = if ratio.is_nan() { 1.0 } else { ratio.clamp(1e-6, 1e6) };
        let new = ratio as f32;
        let place = |sorted: &[f32], value: f32| sorted.partition_point(|x| *x < value);
        if self.ring.len() < RESIDUALS {
            self.ring.push(new);
            let at = place(&self.sorted, new);
            self.sorted.insert(at, new);
            // Welford
            let (log, count) = (ratio.ln(), self.ring.len() as f64);
            let off = log - self.mean;
            self.mean += off / count;
            self.squares += off * (log - self.mean);
            return;
        }
        let old = std::mem::replace(&mut self.ring[self.next], new);
        self.next = (self.next + 1) % RESIDUALS;
        let (from, to) = (place(&self.sorted, old), place(&self.sorted, new));
        let at = if from < to {
            // the old one leaves a gap below
            self.sorted.copy_within(from + 1..to, from);
            to - 1
        } else {
            self.sorted.copy_within(to..from, to + 1);
            to
        };
        self.sorted[at] = new;
    }

    /// Half are smaller.
    pub(super) fn median(&self) -> Option<f64> {
        self.sorted.get(self.sorted.len() / 2).map(|x| f64::from(*x))
    }

    /// How many are beyond [`Window::edges`] at either end.
    fn outside(&self) -> usize {
        ((self.sorted.len() as f64 + 1.0) * TAIL) as usize
    }

    /// There are enough for quantiles, whatever their distribution.
    pub(super) fn has_quantiles(&self) -> bool {
        self.outside() > 0
    }

    /// The next one is smaller than the first of these, or larger than the second, with a chance of [`TAIL`] each,
    /// whatever its distribution, if it is of a piece with those here (split conformal prediction: the r-th smallest of
    /// n has a part of `r / (n + 1)` below it). A window that is too short for that has the bounds of a normal
    /// distribution of its logarithms. `None` before it has [`FEW`].
    pub(super) fn edges(&self) -> Option<[f64; 2]> {
        let (n, outside) = (self.sorted.len(), self.outside());
        if outside > 0 {
            // the outside-th from each end
            let [low, high] = [self.sorted[outside - 1], self.sorted[n - outside]];
            return Some([f64::from(low), f64::from(high)]);
        }
        if n < FEW {
            return None;
        }
        let free = n as f64 - 1.0;
        let deviation = (self.squares / free).sqrt();
        let reach = student(free) * deviation * (1.0 + 1.0 / n as f64).sqrt();
        Some([(self.mean - reach).exp(), (self.mean + reach).exp()])
    }

    /// The smallest and the largest.
    pub(super) fn extremes(&self) -> Option<[f64; 2]> {
        Some([f64::from(*self.sorted.first()?), f64::from(*self.sorted.last()?)])
    }
}

/// Student's t where the upper tail is [`TAIL`]: Cornish and Fisher's expansion about the normal one, within 2 % from
/// `FEW - 1` degrees of freedom on.
fn student(free: f64) -> f64 {
    let z = TAIL_DEVIATIONS;
    let third = (z.powi(3) + z) / 4.0;
    let fifth = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let seventh = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    z + third / free + fifth / free.powi(2) + seventh / free.powi(3)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_the_last_and_has_them_sorted(all in prop::collection::vec(prop_oneof![0.5f64..2.0, Just(1.0)], 0..3000)) {
            let mut window = Window::default();
            for x in &all {
                window.push(*x);
            }
            let mut last: Vec<f32> = all.iter().rev().take(RESIDUALS).map(|x| *x as f32).collect();
            last.sort_by(f32::total_cmp);
            prop_assert_eq!(&window.sorted, &last);
            prop_assert_eq!(window.median(), last.get(last.len() / 2).map(|x| f64::from(*x)));
        }
    }

    #[test]
    fn student_is_close_to_tables() {
        // t with 0.35 % above it
        for (free, t) in [(7.0, 3.768), (9.0, 3.474), (15.0, 3.122), (30.0, 2.895), (100.0, 2.754), (1e9, 2.697)] {
            assert!((student(free) / t - 1.0).abs() < 0.02, "{free} {t} {}", student(free));
        }
    }

    #[test]
    fn a_full_window_leaves_three_outside() {
        let mut window = Window::default();
        (1..=RESIDUALS).for_each(|x| window.push(x as f64));
        assert_eq!(window.edges(), Some([3.0, 998.0]));
        // the next is above the 998th of 1000 with a chance of 3 in 1001
        const { assert!(3.0 / 1001.0 <= TAIL) };
    }

    #[test]
    fn what_is_no_ratio_is_taken_as_one() {
        let mut window = Window::default();
        for x in [f64::NAN, f64::INFINITY, 0.0, -1.0, f64::NEG_INFINITY] {
            window.push(x);
        }
        assert_eq!(window.sorted.len(), 5);
        assert!(window.sorted.iter().all(|x| (1e-6..=1e6).contains(x)), "{window:?}");
        (0..20).for_each(|_| window.push(1.0));
        assert!(window.edges().is_some_and(|edges| edges.iter().all(|x| x.is_finite())));
    }
}
