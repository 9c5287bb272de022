//! The ablation in small: the harness gives sensible figures. `make ablation` runs it whole.

use router_core::Mode;
use router_sim::Lengths;
use router_sim::ablation::{Setup, at_saturation, spread};

const SMALL: Setup = Setup { workers: 2, seconds: 100.0, seed: 1, lengths: Lengths::sharegpt_like() };

#[test]
fn slices_saturate_a_worker_that_packs() {
    let figures = at_saturation(Mode::Slice, &SMALL);
    println!("{figures:?}");
    // simulation study, 8 workers: 54 requests a second
    assert!(figures.throughput > 2.0 * 5.0 && figures.throughput < 2.0 * 8.0, "{figures:?}");
    assert!(figures.pad + figures.invalid == 0.0 && figures.idle < 0.2, "{figures:?}");
    assert!(spread(Mode::Slice, &SMALL, 8.0) < 10.0);
}
