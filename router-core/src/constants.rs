//! The few numbers that are chosen and not measured, each with its reason. Nothing else about scheduling is settable.

use crate::units::Micros;

/// S as the memory horizon: an eighth of the measured mean output, within these. Below 16 a full worker evicts, above
/// 128 it keeps blocks idle; between them throughput is within 2.5 % of the best (simulation study, six workloads).
pub(crate) const LEAST_SLICE: u32 = 16;
/// See [`LEAST_SLICE`].
pub(crate) const MOST_SLICE: u32 = 128;
/// S is this part of the mean output.
pub(crate) const SLICES_AN_OUTPUT: f64 = 8.0;
/// S before the first answer has ended.
pub(crate) const FIRST_SLICE: u32 = 32;
/// Answers the mean output remembers: long enough to be steady, short enough to follow the hour.
pub(crate) const MEMORY: f64 = 256.0;
/// Arrivals and slice starts that their mean remembers: the cut rule has to follow a burst within a few of them.
pub(crate) const JOINS: f64 = 16.0;

/// Iterations of a batch by which its residuals are kept apart: pooled over all, long slices were covered only in 72 to
/// 97 % of cases, because the noise of few iterations is not that of many (simulation study).
pub(crate) const BUCKETS: [u32; 4] = [1, 4, 16, u32::MAX];
/// Residuals kept of each bucket: the least that holds a quantile of 99.5 % with five to spare.
pub(crate) const RESIDUALS: usize = 1000;

/// Part of slices that may take longer than their band says, and part that may take less: with the three of a window of
/// [`RESIDUALS`] that this leaves outside at either end 99.4 % are covered, so that the 99 % promised survive what
/// changes within a window.
pub(crate) const TAIL: f64 = 0.0035;
/// A normal distribution has [`TAIL`] beyond so many standard deviations.
pub(crate) const TAIL_DEVIATIONS: f64 = 2.697;
/// Residuals from which a spread is estimated: with fewer, Student's t makes it as wide as no estimate at all.
pub(crate) const FEW: usize = 8;
/// Batches by which the correction of a new worker settles. Their residuals are not kept: they would widen a thousand bands.
pub(crate) const SETTLE: u32 = 16;
/// A batch moves the correction by at least this part: as quick as a change of load, and not so quick that its own noise
/// widens the band (by 1.6 %).
pub(crate) const CORRECTION_GAIN: f64 = 1.0 / 16.0;
/// Part by which a band is wider at each end than its residuals ask for. Where there is next to no noise they hang together
/// (the same rows stay over slices), and bands miss by a thousandth: 98.9 % were covered without it, 99.3 % with it.
pub(crate) const BAND_SLACK: f64 = 0.002;
/// A model that the worker measured is right within this factor, or something is wrong with it.
pub(crate) const TRUST_MEASURED: f64 = 2.0;
/// The model of a worker that announced none: a slow CPU and a fast GPU are this far from it.
pub(crate) const TRUST_UNKNOWN: f64 = 1e3;
/// The band of such a worker before it has run [`SETTLE`] batches: wide, but short of saying nothing.
pub(crate) const START_UNKNOWN: f64 = 10.0;
/// Tokens of an output before any has ended, weighing as one row that ended.
pub(crate) const FIRST_OUTPUT: f64 = 256.0;
/// Iterations foreseen of a batch (1.5 MB): a slice has at most [`MOST_SLICE`], and a sequence seldom as many.
pub(crate) const MOST_FORESEEN: u32 = 1 << 16;
/// Standard deviations of the rows' ends by which the lower and upper span differ from the mean one. They only make the
/// span of a batch whose time depends much on its ends wider than that of one whose does not; the residuals' quantiles
/// then scale all. Anything from 0 to 2.6 gives bands within a tenth of the narrowest; this is the best of them.
pub(crate) const DEVIATIONS: f64 = 1.3;
/// Part of the rows' time that ends can take away: a batch that runs has a row.
pub(crate) const MOST_LOST: f64 = 0.9;
/// A worker's clock and messages on their way make a batch seem shorter than it was by no more than its own time and this.
pub(crate) const LINK: Micros = Micros(1_000_000);

/// Rows that a rectangle's plan looks at, as a multiple of those a batch may have: enough to find rows of like length, and a
/// plan's price does not grow with the queue.
pub(crate) const WINDOW: usize = 4;
/// Moves of waiting rows in one round: each changes what the next one sees.
pub(crate) const MOST_BALANCED: usize = 8;
/// Workers that a round looks at for each slice that ended: with more, rounds are rarer, so that the look at all workers costs
/// a report no more than it does here (62 us at 1,000 workers with rows waiting on each, without it).
pub(crate) const BALANCED_WORKERS: usize = 64;

/// Chunks of a prompt that goes at the pace which is best for it and the rows beside it together. One of more slows them for so
/// long that a percentile of their time between tokens would be that of its iterations: it goes at the pace of one step.
pub(crate) const SOME_CHUNKS: u64 = 16;
