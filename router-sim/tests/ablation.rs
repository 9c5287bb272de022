//! The ablation in small: fewer workers, a shorter time. `make ablation` runs it whole.

use router_core::{Mode, Pooled};
use router_sim::Lengths;
use router_sim::ablation::{Setup, at_saturation, spread};

const SMALL: Setup = Setup { workers: 2, seconds: 300.0, seed: 1, lengths: Lengths::sharegpt_like() };

#[test]
fn property_15_each_step_of_the_paper_serves_more_and_slices_serve_most() {
    let steps = [Pooled::sls(), Pooled::so(), Pooled::pm(), Pooled::ab(), Pooled::lb(), Pooled::scls()];
    let [sls, so, pm, ab, lb, last] = steps.map(|step| at_saturation(Mode::Pooled(step), &SMALL));
    let slice = at_saturation(Mode::Slice, &SMALL);
    let rates = [sls, so, pm, ab, lb, last, slice].map(|figures| figures.throughput);
    println!("{rates:.2?}");
    assert!(rates[..4].is_sorted_by(|less, more| less < more), "sls, so, pm, ab: {rates:?}");
    // two percent are a tie on eight workers in ten minutes; this is a smaller sample
    assert!(rates[4..6].iter().all(|rate| *rate > 0.95 * rates[3]), "ab, lb, scls: {rates:?}");
    assert!(rates[..6].iter().all(|rate| *rate < rates[6]), "slice: {rates:?}");
    // what each step is there for
    assert!(pm.pad < so.pad && so.invalid < sls.invalid && ab.rows > pm.rows);
    assert!(slice.pad + slice.invalid == 0.0 && slice.again < 0.05 && slice.idle < 0.05, "{slice:?}");
}

#[test]
fn a_drained_pool_of_slices_ends_together() {
    let minute = Setup { seconds: 60.0, ..SMALL };
    assert!(spread(Mode::Slice, &minute, 8.0) < 10.0);
}
