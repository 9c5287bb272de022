//! What pictures need of a run, small enough to keep of every run of a grid.

use router_sim::summary::{Window, measured, thinned};
use router_sim::{Lane, Record, Run, Served};

use super::execute::WARM;

/// Points of a distribution.
const POINTS: usize = 200;
/// Points in time.
const TIMES: usize = 400;

/// A run as pictures show it.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    /// Quantiles at equal steps of TTFT, TPOT and latency, in seconds; empty where no request has one.
    pub distributions: [Vec<f64>; 3],
    /// Seconds, and the rows of each worker then.
    pub batches: Vec<(f64, Vec<u32>)>,
    /// Slices as they ran.
    pub lanes: Vec<Lane>,
}

impl Curves {
    /// Of a run.
    pub fn of(run: &Run<'_>, record: &Record) -> Self {
        let window = Window::of(run, record, WARM);
        let served: Vec<&Served> = measured(run, record, window).collect();
        let of = |figure: fn(&Served) -> Option<f64>| quantiles(served.iter().filter_map(|one| figure(one)).collect());
        let seconds = |sample: &router_sim::FleetSample| sample.at.0 as f64 * 1e-6;
        Self {
            distributions: [of(Served::ttft), of(Served::tpot), of(Served::latency)],
            batches: thinned(&record.samples, TIMES).map(|one| (seconds(one), one.batch_size.clone())).collect(),
            lanes: record.lanes.clone(),
        }
    }

    /// The fullest worker over the mean, where anybody has rows.
    pub fn imbalance(&self) -> Vec<(f64, f64)> {
        let one = |(at, rows): &(f64, Vec<u32>)| {
            let sum: u64 = rows.iter().map(|one| u64::from(*one)).sum();
            let most = f64::from(rows.iter().copied().max()?);
            (sum > 0).then(|| (*at, most * rows.len() as f64 / sum as f64))
        };
        self.batches.iter().filter_map(one).collect()
    }
}

fn quantiles(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let at = |point: usize| values.get(point * values.len().saturating_sub(1) / POINTS).copied();
    (0..=POINTS).filter_map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_go_from_the_least_to_the_most() {
        let all = quantiles((0..1000).rev().map(f64::from).collect());
        assert_eq!((all.len(), all[0], all[POINTS]), (POINTS + 1, 0.0, 999.0));
        assert!(quantiles(vec![]).is_empty());
        assert_eq!(quantiles(vec![3.0]), vec![3.0; POINTS + 1]);
    }

    #[test]
    fn imbalance_leaves_out_times_without_rows() {
        let curves = Curves { batches: vec![(0.0, vec![0, 0]), (1.0, vec![3, 1])], ..Curves::default() };
        assert_eq!(curves.imbalance(), [(1.0, 1.5)]);
    }
}
