use proptest::prelude::*;
use router_core::{BlockHash, BlockSize, CostModel, Layout, Micros, Tokens};

use super::naive::Naive;
use super::*;
use crate::timing::{Law, Norm};
use crate::trace::{Trace, TraceRequest};

/// A trace of these chains: nothing else of it matters here.
pub(crate) fn trace(chains: &[&[u64]]) -> Trace {
    let mut trace = Trace { block_size: BlockSize::new(4), ..Trace::default() };
    for chain in chains {
        let start = trace.blocks.len() as u32;
        trace.blocks.extend(chain.iter().map(|name| BlockHash(*name)));
        trace.requests.push(TraceRequest {
            at: Micros::ZERO,
            input: 4 * chain.len() as u32 + 1,
            output: 1,
            chain: (start, chain.len() as u32),
            session: None,
            turn: 0,
            class: 0,
        });
    }
    trace
}

fn device(kv: u64, chunk: u32, max_rows: u32, law: Law) -> Device {
    let (host, start) = (Micros(100), Micros::ZERO);
    Device { name: "test".into(), law, kv: Tokens(kv), chunk, max_rows, host, start }
}

/// What was said when: in the order it was said, blocks sorted.
#[derive(Debug, Default, PartialEq)]
struct Log {
    tokens: Vec<(Micros, u64)>,
    rows: Vec<(Micros, Said)>,
    stored: Vec<(Micros, Vec<BlockHash>)>,
    removed: Vec<(Micros, Vec<BlockHash>)>,
}

fn names(trace: &Trace, chains: &Chains, spans: &[Span]) -> Vec<BlockHash> {
    let mut names: Vec<_> = spans.iter().flat_map(|span| chains.names(trace, *span)).copied().collect();
    names.sort_unstable();
    names
}

/// A made-up case: a device, and requests as (gap before it, chain, input tokens after the chain, output).
#[derive(Clone, Debug)]
struct Case {
    size: u32,
    blocks: u64,
    chunk: u32,
    max_rows: u32,
    sigma: f64,
    norm: bool,
    requests: Vec<(u64, (u64, u32), u32, u32)>,
}

fn case() -> impl Strategy<Value = Case> {
    let gap = prop_oneof![Just(0u64), 0u64..3_000, 0u64..60_000];
    let request = (gap, (0u64..4, 0u32..8), 0u32..12, prop_oneof![1u32..4, 1u32..60]);
    let shape = (1u32..6, 12u64..60, 1u32..24, 1u32..9);
    (shape, prop_oneof![Just(0.0), Just(0.1)], any::<bool>(), proptest::collection::vec(request, 1..30)).prop_map(
        |((size, blocks, chunk, max_rows), sigma, norm, requests)| Case {
            size,
            blocks,
            chunk,
            max_rows,
            sigma,
            norm,
            requests,
        },
    )
}

/// Runs both over the same requests; the fast one is compared at all times at which it says something.
fn both(case: &Case) -> (Log, Log, u64) {
    let size = BlockSize::new(case.size).expect("not zero");
    let mut trace = Trace { block_size: Some(size), ..Trace::default() };
    let mut at = Micros::ZERO;
    for &(gap, (family, depth), rest, output) in &case.requests {
        at += Micros(gap);
        let start = trace.blocks.len() as u32;
        // two families share their first three blocks
        trace
            .blocks
            .extend((0..u64::from(depth)).map(|i| BlockHash(if i < 3 { family / 2 } else { family } * 100 + i)));
        let input = depth * case.size + rest.min(case.size - 1).max(u32::from(depth == 0));
        let chain = (start, depth);
        trace.requests.push(TraceRequest { at, input, output, chain, session: None, turn: 0, class: 0 });
    }
    let chains = Chains::new(&trace);
    let linear = Law::Linear(CostModel::unknown(Layout::Paged));
    let law = if case.norm { Law::Norm(Norm::llama_13b_a100()) } else { linear };
    let device = device(case.blocks * u64::from(case.size), case.chunk, case.max_rows, law);
    let noise = Noise { sigma: case.sigma, bias: 0.1, seed: 7 };
    let (mut fast, mut naive) = (Engine::new(&device, size, noise, true), Naive::new(&device, size, noise));
    let (mut left, mut right) = (Log::default(), Log::default());
    let mut requests = trace.requests.iter().zip(0..).peekable();
    let mut report = Report::default();
    loop {
        let arrival = requests.peek().map(|(request, _)| request.at);
        let next = [arrival, fast.due(), naive.due].into_iter().flatten().min();
        let Some(now) = next else { break };
        assert!(naive.due.is_some() == fast.due().is_some(), "both are idle or neither");
        if arrival == Some(now) {
            let Some((request, number)) = requests.next() else { break };
            let (input, output) = (request.input, request.output);
            if Engine::holds(&device, size, input, output) {
                let arrival = Arrival { request: number, input, output, expected: input };
                fast.push(&chains, arrival, now);
                naive.push(trace.chain(request), arrival, now);
            }
            continue;
        }
        if naive.due == Some(now) {
            naive.wake();
            right.rows.extend(naive.said.iter().map(|said| (now, *said)));
            for (log, names) in [(&mut right.stored, &mut naive.stored), (&mut right.removed, &mut naive.removed)] {
                if !names.is_empty() {
                    names.sort_unstable();
                    log.push((now, std::mem::take(names)));
                }
            }
        }
        if fast.due() == Some(now) {
            fast.wake(&chains, &mut report);
            left.rows.extend(report.rows.iter().map(|said| (now, *said)));
            for (log, spans) in [(&mut left.stored, &report.stored), (&mut left.removed, &report.removed)] {
                if !spans.is_empty() {
                    log.push((now, names(&trace, &chains, spans)));
                }
            }
            left.tokens.push((now, report.standing.tokens));
            right.tokens.push((now, naive.tokens()));
        }
    }
    let (used, cached) = naive.used_and_cached();
    assert_eq!((used, cached), (fast.pool.used(), fast.pool.cached()));
    assert_eq!((used, fast.batch_size(), fast.queued(), fast.tokens), (0, 0, 0, 0), "all is given back");
    (left, right, fast.outcome.evicted.0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]
    #[test]
    fn the_fast_engine_is_the_naive_one(case in case()) {
        let (fast, naive, _) = both(&case);
        prop_assert_eq!(fast, naive);
    }
}

#[test]
fn the_engines_agree_under_pressure() {
    // eight long answers in a third of the blocks they will fill
    let requests = (0..8).map(|i| (200, (i % 4, 2), 1, 50)).collect();
    let case = Case { size: 4, blocks: 40, chunk: 16, max_rows: 8, sigma: 0.0, norm: false, requests };
    let (fast, naive, evicted) = both(&case);
    assert_eq!(fast, naive);
    assert!(evicted > 100, "{evicted}");
    let preempted = fast.rows.iter().filter(|(_, said)| matches!(said, Said::Ended(_, row) if row.preempted > 0));
    assert!(preempted.count() > 1);
}

#[test]
fn a_row_that_comes_shortens_what_was_computed_ahead() {
    let trace = trace(&[&[], &[]]);
    let chains = Chains::new(&trace);
    let model = CostModel::unknown(Layout::Paged);
    let device = device(4096, 64, 8, Law::Linear(model));
    let size = BlockSize::new(16).expect("not zero");
    let mut engine = Engine::new(&device, size, Noise::default(), false);
    let mut report = Report::default();
    engine.push(&chains, Arrival { request: 0, input: 1, output: 60, expected: 1 }, Micros::ZERO);
    engine.wake(&chains, &mut report);
    assert_eq!(report.rows, [Said::Prefilled(0)]);
    let (first, last) = (report.standing.at, engine.due().expect("it decodes"));
    assert_eq!((report.standing.steps, report.standing.tokens_at(last)), (59, 61));
    // 59 steps of some 3.15 ms: the second row comes in the tenth
    let middle = first + Micros(30_000);
    engine.push(&chains, Arrival { request: 1, input: 9, output: 1, expected: 9 }, middle);
    let end = engine.due().expect("it decodes");
    assert!(end >= middle && end < middle + Micros(3_300), "{end}");
    engine.wake(&chains, &mut report);
    assert_eq!((report.rows.len(), report.standing.waiting, report.standing.tokens), (0, 1, 12 + 9));
    engine.wake(&chains, &mut report);
    let ended = Ended { first: report.standing.at, output: 1, ..Ended::default() };
    assert_eq!(report.rows, [Said::Prefilled(1), Said::Ended(1, ended)]);
}
