//! `cargo run -p router-sim --example validate -- FILE...`: how near the simulator comes to recorded runs.

use router_sim::{RecordedRun, validate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        println!("{}\n", validate(&RecordedRun::parse(&std::fs::read(path)?)?)?);
    }
    Ok(())
}
