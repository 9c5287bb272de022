//! Property 4: what the product does with a hot prefix, against the fluid model of the hotspot page.
//!
//! Of all requests a part `x` shares a prefix; a worker that holds it computes `u` tokens of such a prompt, another `L`. All rows
//! stay equally long. With `m` holders of `n` the batches of holders are `r(m) = x(n-m) / ((1-x)m)` times as large as those of
//! others while `r < rho = L/u`; past that the class spills, and every spill makes one more holder, so that it settles at no
//! fewer than `m* = ceil(nx / (x + rho(1-x)))`.

use router_core::{BlockHash, BlockSize, Choice, Commit, Guarding, Micros, Tokens};
use router_sim::{Device, Fleet, Law, Noise, Norm, Random, Run, Sessions, System, Trace, TraceRequest, follow};

const WORKERS: u32 = 16;
const BLOCK: u32 = 16;

/// Poisson arrivals at `rate` a second; each is hot with probability `x`, and then shares `hot` of its `hot + fresh` tokens.
fn trace(seed: u64, rate: f64, seconds: f64, x: f64, hot: u32, fresh: u32, output: u32) -> Trace {
    let mut random = Random::new(seed);
    let mut trace = Trace { block_size: BlockSize::new(BLOCK), ..Trace::default() };
    trace.classes = vec!["other".into(), "hot".into()];
    trace.blocks = (0..u64::from(hot / BLOCK)).map(BlockHash).collect();
    let mut at = 0.0;
    loop {
        at += random.exponential(1.0 / rate);
        if at > seconds {
            return trace;
        }
        let class = u16::from(random.chance(x));
        // both kinds are as long, and compute as much where nothing is held: only what is held tells them apart
        let (input, chain) = if class == 1 { (hot + fresh, (0, hot / BLOCK)) } else { (hot + fresh, (0, 0)) };
        let at = Micros((at * 1e6) as u64);
        trace.requests.push(TraceRequest { at, input, output, chain, session: None, turn: 0, class });
    }
}

/// Iterations of 10 ms whatever is in them, and no limit that could bind: rows stay as long as their answers are.
fn device() -> Device {
    let law = Law::Norm(Norm { weights: 0.01, token: 1e-12, kv: 0.0, pair: 0.0, row: 0.0 });
    let (kv, host, start) = (Tokens(1 << 30), Micros::ZERO, Micros::ZERO);
    Device { name: "fluid".into(), law, kv, chunk: 1 << 30, max_rows: 1 << 20, host, start }
}

/// Measured: holders at the end, batches of holders over those of others while there were so many, and the mean batch.
fn measured(seed: u64, x: f64, rho: u32, mean: u32) -> (u32, f64, f64) {
    let (fresh, output) = (BLOCK, 400);
    let rate = f64::from(mean * WORKERS) / (f64::from(output) * 0.01);
    let trace = trace(seed, rate, 240.0, x, fresh * (rho - 1), fresh, output);
    let fleet = Fleet {
        workers: WORKERS,
        device: device(),
        slow: Vec::new(),
        noise: Noise::default(),
        delay: Micros::ZERO,
        lost: Vec::new(),
        joined: Vec::new(),
    };
    let run = Run {
        trace: &trace,
        fleet,
        system: System::Continuous { policy: "product".into(), commit: Commit::Prefixes, guard: Guarding::Off },
        sessions: Sessions::Open,
        limit: output,
        seed,
        until: Micros(400_000_000),
        sample_every: Micros(500_000),
    };
    // who holds the prefix, by time
    let mut holders: Vec<(Micros, u32)> = vec![(Micros::ZERO, 0)];
    let mut mask = 0u32;
    let mut decided = |at: Micros, request: u32, choice: &Choice| {
        if trace.requests[request as usize].class == 1 && mask & 1 << choice.at == 0 {
            mask |= 1 << choice.at;
            holders.push((at, mask));
        }
    };
    let record = follow(&run, &mut |_| true, &mut decided).expect("it runs");
    let last = trace.requests[trace.requests.len() - 1].at;
    let m = mask.count_ones();
    let (mut held, mut other, mut all, mut count) = (0.0, 0.0, 0.0, 0.0);
    let settled = holders[holders.len() - 1].0 + Micros(20_000_000);
    for sample in record.samples.iter().filter(|sample| sample.at > settled.max(Micros(40_000_000)) && sample.at < last)
    {
        for (worker, b) in sample.batch_size.iter().enumerate() {
            let part = if mask & 1 << worker == 0 { &mut other } else { &mut held };
            *part += f64::from(*b);
            all += f64::from(*b);
        }
        count += 1.0;
    }
    let ratio = (held / f64::from(m)) / (other / f64::from(WORKERS - m).max(1.0));
    (m, ratio, all / count / f64::from(WORKERS))
}

#[test]
fn property_4_fluid_model() {
    let n = f64::from(WORKERS);
    let mut seen = 0;
    for (seed, (x, rho)) in [(0.1, 10), (0.25, 10), (0.5, 10), (0.8, 10), (0.25, 33), (0.5, 33), (0.5, 100), (0.8, 100)]
        .into_iter()
        .enumerate()
    {
        let (m, ratio, mean) = measured(seed as u64, x, rho, 12);
        let least = (n * x / (x + f64::from(rho) * (1.0 - x))).ceil();
        let held = f64::from(m);
        let r = x * (n - held) / ((1.0 - x) * held);
        let predicted = r.min(f64::from(rho));
        println!(
            "x {x} rho {rho}: m {m} (m* {least}), r {r:.2}, predicted {predicted:.2}, seen {ratio:.2}, b {mean:.1}"
        );
        assert!(mean >= 8.0);
        assert!(held >= least && held <= least + 6.0, "x {x}, rho {rho}: {m} holders, m* is {least}");
        if r >= 1.3 {
            assert!((ratio / predicted - 1.0).abs() < 0.15, "x {x}, rho {rho}: {ratio:.2}, predicted {predicted:.2}");
            seen += 1;
        }
    }
    assert!(seen >= 4, "in most cases the class stays apart: {seen}");
}
