//! When an answer is foreseen to be whole, for clients.

use std::fmt;
use std::time::Duration;

use router_core::{Band, Micros};
use tokio::time::Instant;

use crate::proto;

/// From the placing of its last row the answer takes no less than `lo`, and no more than `hi` if it draws all its tokens,
/// as loads were then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eta {
    placed: Instant,
    lo: Duration,
    hi: Duration,
}

impl Eta {
    /// Of a row that was placed at this time; `None` where nothing is foreseen of it.
    pub fn of_row(placed: Instant, band: Band) -> Option<Self> {
        let time = |micros: Micros| Duration::from_micros(micros.0);
        (band.hi > Micros::ZERO).then(|| Self { placed, lo: time(band.lo.min(band.hi)), hi: time(band.hi) })
    }

    /// Of two parts: the answer is whole when both are.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let placed = self.placed.max(other.placed);
        let from = |eta: Self| {
            let since = placed - eta.placed;
            (eta.lo.saturating_sub(since), eta.hi.saturating_sub(since))
        };
        let (ours, theirs) = (from(self), from(other));
        Self { placed, lo: ours.0.max(theirs.0), hi: ours.1.max(theirs.1) }
    }

    /// Of all parts; `None` where one is not foreseen, or there are none.
    pub fn all(parts: impl IntoIterator<Item = Option<Self>>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let first = parts.next()??;
        parts.try_fold(first, |all, part| Some(all.and(part?)))
    }

    /// Milliseconds, rounded outwards.
    pub fn millis(&self) -> [u64; 2] {
        let whole = |micros: u128| u64::try_from(micros / 1000).unwrap_or(u64::MAX);
        [whole(self.lo.as_micros()), whole(self.hi.as_micros() + 999)]
    }
}

/// As the header says it.
impl fmt::Display for Eta {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [lo, hi] = self.millis();
        write!(out, "{lo}-{hi}")
    }
}

impl From<Eta> for proto::Eta {
    fn from(eta: Eta) -> Self {
        let [lo_ms, hi_ms] = eta.millis();
        Self { lo_ms, hi_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eta(placed: Instant, lo: u64, hi: u64) -> Option<Eta> {
        Eta::of_row(placed, Band { lo: Micros(lo), hi: Micros(hi) })
    }

    #[test]
    fn rounds_outwards_and_keeps_the_order() {
        let now = Instant::now();
        for (lo, hi, said) in [
            (1_999, 2_001, "1-3"),
            (0, 1, "0-1"),
            (5_000, 5_000, "5-5"),
            (9_000, 5_000, "5-5"),
            (u64::MAX, u64::MAX, "18446744073709551-18446744073709552"),
        ] {
            assert_eq!(eta(now, lo, hi).expect("foreseen").to_string(), said, "{lo} {hi}");
        }
        assert_eq!(eta(now, 0, 0), None);
        assert_eq!(eta(now, 5, 0), None);
    }

    #[test]
    fn of_several_rows_the_last_to_end_counts_from_the_last_placing() {
        let now = Instant::now();
        let later = now + Duration::from_millis(10);
        let (long, short) = (eta(now, 50_000, 90_000), eta(later, 20_000, 95_000));
        for rows in [[long, short], [short, long]] {
            assert_eq!(Eta::all(rows).expect("all are foreseen").millis(), [40, 95]);
        }
        // Its time is over, yet nothing is negative.
        assert_eq!(Eta::all([eta(now, 1, 1), eta(later, 1_000, 2_000)]).expect("both").millis(), [1, 2]);
        assert_eq!(Eta::all([long, None]), None);
        assert_eq!(Eta::all([None, long]), None);
        assert_eq!(Eta::all([]), None);
    }
}
