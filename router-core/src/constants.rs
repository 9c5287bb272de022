//! The few numbers that are chosen and not measured, each with its reason. Nothing else about scheduling is settable.

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
