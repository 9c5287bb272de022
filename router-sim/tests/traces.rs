//! The traces that come with the repository read as what they are, and scale without losing what they share.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use hashbrown::{HashMap, HashSet};
use proptest::prelude::*;
use router_core::{BlockHash, BlockSize, Micros, Tokens};
use router_sim::trace::{Format, Reading, block_size_in_meta};
use router_sim::{Burst, Trace, TraceError, TraceRequest};

const SMOKE: &[u8] = include_bytes!("../../bench/traces/mooncake_conversation_smoke.jsonl.gz");

fn packed(name: &str) -> Trace {
    let path = format!("{}/../bench/traces/{name}.jsonl.gz", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    read(&bytes).expect("it comes with the repository").trace
}

fn read(bytes: &[u8]) -> Result<Reading, TraceError> {
    Trace::read("t", bytes, None)
}

fn smoke() -> Trace {
    read(SMOKE).expect("it comes with the repository").trace
}

fn gzipped(text: &str) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(text.as_bytes()).expect("to memory");
    gzip.finish().expect("to memory")
}

#[test]
fn every_trace_has_its_numbers() {
    type Lengths = (f64, u32, u32, u32);
    // blocks, different ones, reuse, ideal hit, top: of whole blocks, by a program that knows none of this one
    type Blocks = (u64, u64, f64, f64, f64);
    type Line = (&'static str, u64, f64, f64, Lengths, Lengths, u64, Option<(u64, Blocks)>);
    let table: [Line; 9] = [
        ("azure_code", 4827, 1500.0, 3.217, (2049.0, 1468, 7436, 7437), (27.5, 13, 246, 1899), 0, None),
        ("azure_conv", 7869, 1499.8, 5.246, (1191.0, 1040, 4111, 14050), (238.5, 169, 622, 1000), 0, None),
        (
            "coder_sessions",
            2758,
            1799.5,
            1.532,
            (80686.1, 77117, 162_592, 197_410),
            (417.4, 206, 3854, 12625),
            149,
            Some((64, (3_475_695, 228_986, 0.9341, 0.9337, 0.1345))),
        ),
        (
            "mooncake_conversation",
            5719,
            1799.2,
            3.178,
            (12870.1, 7640, 91305, 123_192),
            (345.7, 356, 1105, 2000),
            0,
            Some((512, (140_758, 90869, 0.3544, 0.347, 1.0))),
        ),
        (
            "mooncake_conversation_smoke",
            300,
            103.4,
            2.89,
            (14233.2, 8770, 89867, 120_633),
            (376.9, 398, 929, 2000),
            0,
            Some((512, (8190, 7515, 0.0824, 0.0809, 1.0))),
        ),
        (
            "mooncake_mixed",
            1000,
            179.4,
            5.569,
            (9792.0, 6559, 81406, 121_290),
            (199.1, 34, 835, 2000),
            0,
            Some((512, (18689, 11221, 0.3996, 0.3905, 0.486))),
        ),
        ("servegen_mid", 10096, 1799.9, 5.609, (1766.1, 467, 26264, 96435), (427.0, 197, 2678, 8000), 0, None),
        ("servegen_reason", 9116, 1800.0, 5.064, (2167.4, 271, 26334, 39629), (1654.3, 705, 16886, 26634), 0, None),
        (
            "tau_airline",
            1229,
            430.7,
            2.851,
            (2739.5, 2434, 6369, 7936),
            (67.1, 56, 233, 316),
            100,
            Some((16, (209_852, 11786, 0.9438, 0.9412, 1.0))),
        ),
    ];
    for (name, requests, duration, rate, input, output, sessions, blocks) in table {
        let trace = packed(name);
        assert_eq!(trace.name, name);
        let stats = trace.stats();
        assert_eq!((stats.requests, stats.sessions), (requests, sessions), "{name}");
        assert!((stats.duration - duration).abs() <= 0.05 && (stats.rate - rate).abs() <= 0.0006, "{name}: {stats:?}");
        for (found, (mean, p50, p99, most)) in [(stats.input, input), (stats.output, output)] {
            assert!((found.mean - mean).abs() <= 0.0501, "{name}: {found:?}");
            assert_eq!((found.p50, found.p99, found.most), (p50, p99, most), "{name}");
        }
        assert_eq!(trace.block_size.map(BlockSize::get), blocks.map(|(size, _)| size), "{name}");
        assert_eq!(stats.reuse.is_some(), blocks.is_some(), "{name}");
        if let Some((found, (_, (all, unique, ratio, hit, top)))) = stats.reuse.zip(blocks) {
            assert_eq!((found.blocks, found.unique), (all, unique), "{name}");
            let near = [(found.ratio, ratio), (found.ideal_hit, hit), (found.top, top)];
            assert!(near.iter().all(|(a, b)| (a - b).abs() <= 0.000_06), "{name}: {found:?}");
        }
        assert!(trace.requests.is_sorted_by_key(|request| request.at), "{name}");
        for request in &trace.requests {
            let whole = trace.block_size.map_or(0, |size| u64::from(request.input) / size.get());
            assert_eq!(trace.chain(request).len() as u64, whole, "{name}");
        }
    }
}

#[test]
fn prompts_that_go_on_are_stored_once() {
    let trace = packed("coder_sessions");
    // of 3.5 million names
    assert!(trace.blocks.len() < 1_200_000, "{}", trace.blocks.len());
}

#[test]
fn turns_of_a_session_come_in_order() {
    for name in ["tau_airline", "coder_sessions"] {
        let trace = packed(name).jittered(3).at_rate(5.0, 4).expect("a rate");
        let mut last: HashMap<u32, (u32, Micros)> = HashMap::new();
        for request in &trace.requests {
            let session = request.session.expect("all have one");
            if let Some((turn, at)) = last.insert(session, (request.turn, request.at)) {
                assert!(turn <= request.turn && at <= request.at, "{name}: session {session}");
            }
        }
    }
}

#[test]
fn a_rate_is_what_it_says_and_copies_share_only_what_is_public() {
    for (name, scale) in [("mooncake_conversation_smoke", 12.0), ("tau_airline", 7.0), ("mooncake_mixed", 0.5)] {
        let trace = packed(name);
        let scaled = trace.at_rate(scale, 5).expect("a rate");
        let copies = scaled.requests.len() / trace.requests.len();
        assert_eq!(copies * trace.requests.len(), scaled.requests.len());
        let most = if trace.stats().sessions > 0 { 2.0 } else { 4.0 };
        assert_eq!(copies, (scale / most).ceil() as usize);
        let rate = scaled.stats().rate / trace.stats().rate;
        assert!((rate / scale - 1.0).abs() < 0.05, "{name}: {rate}");
        let [one, all] = [&trace, &scaled].map(|trace| trace.stats().reuse.expect("it has blocks"));
        assert_eq!(all.blocks, one.blocks * copies as u64);
        // what each copy finds is what the trace finds, but for conversations cut where a copy goes round
        assert!((all.ideal_hit - one.ideal_hit).abs() < 0.04, "{name}: {all:?} {one:?}");
        assert!((all.top - one.top).abs() < 1e-12, "{name}: the first block of all stays everybody's");
        let names = |trace: &Trace| -> HashSet<BlockHash> {
            trace.requests.iter().flat_map(|request| trace.chain(request).to_vec()).collect()
        };
        // copies beside the first have no private block of its
        let unique = names(&scaled).len();
        assert!(unique > names(&trace).len() * (copies - 1), "{name}: {unique}");
        assert_eq!(scaled, trace.at_rate(scale, 5).expect("a rate"));
        if copies > 1 {
            assert_ne!(scaled.requests, trace.at_rate(scale, 6).expect("a rate").requests);
        }
    }
}

#[test]
fn what_was_under_way_at_the_start_comes_before_anything_is_measured() {
    let trace = packed("coder_sessions");
    // the price of each fifth: tokens that nobody holds
    let cold = |trace: &Trace| {
        let last = trace.requests.last().expect("requests").at.0;
        let (mut held, mut cold) = (HashSet::<BlockHash>::new(), [0u64; 5]);
        for request in &trace.requests {
            let hit = trace.chain(request).iter().take_while(|name| held.contains(*name)).count() as u64;
            held.extend(trace.chain(request));
            cold[(5 * request.at.0 / (last + 1)) as usize] += u64::from(request.input) - 64 * hit;
        }
        cold
    };
    let one = cold(&trace);
    // half of it is that of the first fifth: conversations that had begun before the trace did
    assert!(one[0] > 2 * one[1..].iter().copied().max().expect("fifths"), "{one:?}");
    for seed in 1..6 {
        let both = cold(&trace.at_rate(4.0, seed).expect("a rate"));
        assert!(both[0] > 2 * both[1..].iter().copied().max().expect("fifths"), "seed {seed}: {both:?}");
    }
    // where all begin with their first turns, copies are spread over all of it
    let tau = packed("tau_airline");
    let window = tau.window(0.0, 216.0).expect("not empty");
    let tenths = |trace: &Trace| {
        let last = trace.requests.last().expect("requests").at.0;
        let mut tenths = [0u32; 10];
        trace.requests.iter().for_each(|request| tenths[(10 * request.at.0 / (last + 1)) as usize] += 1);
        tenths.map(|count| 10.0 * f64::from(count) / trace.requests.len() as f64)
    };
    assert!(tenths(&window)[0] < 0.5, "it begins slowly");
    let spread = tenths(&window.at_rate(60.0, 1).expect("a rate"));
    assert!(spread.iter().all(|share| (share - 1.0).abs() < 0.15), "{spread:?}");
}

#[test]
fn windows_are_rebased_and_repetitions_follow_the_end() {
    let trace = smoke();
    let window = trace.window(20.0, 50.0).expect("not empty");
    let came = trace.requests.iter().filter(|request| (20_000_000..50_000_000).contains(&request.at.0));
    let wanted: Vec<_> = came.map(|request| (request.at.0 - 20_000_000, trace.chain(request))).collect();
    assert_eq!(window.requests.iter().map(|request| (request.at.0, window.chain(request))).collect::<Vec<_>>(), wanted);
    assert!(window.blocks.len() < trace.blocks.len());

    let three = trace.repeated(3).expect("not too many");
    assert_eq!(three.requests.len(), 900);
    assert!(three.requests.is_sorted_by_key(|request| request.at));
    assert_eq!(
        three.requests[..300].iter().map(|r| r.at).collect::<Vec<_>>(),
        trace.requests.iter().map(|r| r.at).collect::<Vec<_>>()
    );
    let [one, all] = [&trace, &three].map(|trace| trace.stats().reuse.expect("it has blocks"));
    // only the first block, in every prompt, is known from before
    assert_eq!(all.unique - 1, 3 * (one.unique - 1));

    let lasting = trace.lasting(250.0).expect("a length");
    assert!((lasting.stats().duration - 250.0).abs() < 5.0, "{}", lasting.stats().duration);
    assert_eq!(trace.lasting(10.0).expect("a length"), trace.window(0.0, 10.0).expect("not empty"));
    for (from, to) in [(-1.0, 5.0), (5.0, 5.0), (f64::NAN, 1.0), (1.0, f64::NAN)] {
        let error = trace.window(from, to).expect_err("no window").to_string();
        assert!(error.contains("0 <= FROM < TO"), "{error}");
    }
    assert!(trace.window(1e6, 2e6).expect_err("nobody").to_string().contains("no requests"));
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e12] {
        trace.at_rate(scale, 1).expect_err("no rate");
    }
    assert!(trace.repeated(0).is_err() && trace.repeated(u32::MAX).is_err() && trace.lasting(f64::NAN).is_err());
}

#[test]
fn jitter_moves_little_and_is_the_seeds() {
    let trace = packed("tau_airline");
    let moved = trace.jittered(1);
    assert_eq!(moved.requests[0].at, Micros::ZERO);
    assert_eq!(moved.requests.len(), trace.requests.len());
    assert_eq!(moved, trace.jittered(1));
    assert_ne!(moved, trace.jittered(2));
    let [before, after] = [&trace, &moved].map(Trace::stats);
    assert!((after.duration - before.duration).abs() < 1e-5, "{} {}", before.duration, after.duration);
    assert_eq!(after.input, before.input);
}

#[test]
fn resampled_lengths_are_the_traces() {
    let trace = packed("azure_conv");
    let drawn = trace.resampled(40.0, 1000.0, 7).expect("a rate");
    let [one, two] = [&trace, &drawn].map(Trace::stats);
    assert!((two.rate / 40.0 - 1.0).abs() < 0.03, "{}", two.rate);
    for (a, b) in [(one.input, two.input), (one.output, two.output)] {
        assert!((a.mean / b.mean - 1.0).abs() < 0.03, "{a:?} {b:?}");
        assert!((f64::from(a.p99) / f64::from(b.p99) - 1.0).abs() < 0.1, "{a:?} {b:?}");
    }
    assert_eq!(drawn.classes, trace.classes);
    assert!(trace.resampled(0.0, 10.0, 1).is_err() && trace.resampled(1.0, f64::INFINITY, 1).is_err());
}

#[test]
fn a_burst_lies_over_the_trace() {
    let burst =
        Burst { from: 30.0, seconds: 20.0, rate: 50.0, shared: Tokens(8192), own: Tokens(32), output: Tokens(64) };
    for (trace, whole) in [(smoke(), 16), (packed("tau_airline"), 514), (packed("azure_conv"), 514)] {
        let all = trace.with_burst(&burst, 3).expect("a burst");
        let class = all.classes.iter().position(|class| class == Burst::CLASS).expect("it has a class");
        let (hot, cold): (Vec<&TraceRequest>, Vec<&TraceRequest>) =
            all.requests.iter().partition(|request| usize::from(request.class) == class);
        assert_eq!(cold.len(), trace.requests.len());
        assert!((hot.len() as f64 / 1000.0 - 1.0).abs() < 0.15, "{}", hot.len());
        assert!(hot.iter().all(|request| (30_000_000..50_000_001).contains(&request.at.0)));
        let shared = (8192 / all.block_size.expect("blocks").get()) as usize;
        let chains: Vec<_> = hot.iter().map(|request| all.chain(request)).collect();
        assert!(chains.iter().all(|chain| chain.len() == whole && chain[..shared] == chains[0][..shared]));
        if whole > shared {
            assert_ne!(chains[0][shared], chains[1][shared]);
        }
        assert!(all.requests.is_sorted_by_key(|request| request.at));
        let nothing = Burst { rate: -1.0, ..burst };
        assert!(trace.with_burst(&nothing, 3).is_err());
        assert!(trace.with_burst(&Burst { output: Tokens(0), ..burst }, 3).is_err());
        assert!(trace.with_burst(&Burst { from: f64::NAN, ..burst }, 3).is_err());
    }
}

#[test]
fn synthetic_traces_say_so_and_are_as_stated() {
    for name in Trace::synthetic_names() {
        assert!(name.starts_with("synthetic-"));
        let trace = Trace::synthetic(name, 20.0, 400.0, 1).expect("a rate");
        let stats = trace.stats();
        assert!((stats.rate / 20.0 - 1.0).abs() < 0.1, "{name}: {}", stats.rate);
        assert_eq!(trace, Trace::synthetic(name, 20.0, 400.0, 1).expect("a rate"));
        assert_ne!(trace, Trace::synthetic(name, 20.0, 400.0, 2).expect("a rate"));
    }
    let agents = Trace::synthetic("synthetic-agents", 20.0, 400.0, 1).expect("a rate").stats();
    let reuse = agents.reuse.expect("it has blocks");
    assert!(agents.sessions > 1000 && reuse.ideal_hit > 0.6, "{agents:?}");
    let error = Trace::synthetic("synthetic-agent", 1.0, 1.0, 1).expect_err("a typo").to_string();
    assert_eq!(error, "synthetic-agent: no such synthetic trace\ndid you mean synthetic-agents?");
    assert!(Trace::synthetic("synthetic-agents", f64::NAN, 1.0, 1).is_err());
    assert!(Trace::synthetic("synthetic-agents", 1e9, 1e9, 1).is_err());
}

#[test]
fn other_formats_are_found_from_their_content() {
    let mooncake = "{\"timestamp\": 27000, \"input_length\": 1100, \"output_length\": 3, \"hash_ids\": [5, 6, 7]}\n\n\
                    {\"timestamp\": 30500, \"input_length\": 512, \"output_length\": 1, \"hash_ids\": [5]}\n";
    let reading = read(mooncake.as_bytes()).expect("mooncake");
    assert_eq!(reading.format, Format::Mooncake);
    let trace = reading.trace;
    assert_eq!(trace.block_size, BlockSize::new(512));
    assert_eq!(
        trace.requests.iter().map(|r| (r.at.0, r.input, r.output)).collect::<Vec<_>>(),
        [(0, 1100, 3), (3_500_000, 512, 1)]
    );
    assert_eq!(trace.chain(&trace.requests[0])[..1], *trace.chain(&trace.requests[1]));
    // it has a place of its own
    assert_eq!(trace.blocks.len(), 2);

    let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.9000000,374,44\r\n2023-11-17 00:00:01.4000000,1,2\r\n";
    for text in [azure.to_owned(), format!("\u{feff}{azure}"), azure.replace("00,", "00+00:00,")] {
        let reading = read(&gzipped(&text)).expect("azure");
        assert_eq!(reading.format, Format::Azure);
        assert_eq!(reading.trace.requests[1].at, Micros(1_500_000));
        assert_eq!(reading.trace.block_size, None);
    }

    let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
                 5,ChatGPT,472,18,490,Conversation log\n45.5,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n";
    let reading = read(burst.as_bytes()).expect("burstgpt");
    assert_eq!((reading.format, reading.dropped), (Format::BurstGpt, 1));
    assert_eq!(reading.trace.requests[1].at, Micros(113_000_000));
    assert_eq!(reading.trace.classes, ["Conversation log", "API log"]);
    let newer = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
                 5.0,a-1,4,GPT-4,472,18,490,Conversation log\n6.0,,4,GPT-4,2,18,20,API log\n7.0,a-1,4,GPT-4,500,18,518,Conversation log\n";
    let trace = read(newer.as_bytes()).expect("burstgpt").trace;
    assert_eq!(
        trace.requests.iter().map(|r| (r.session, r.turn)).collect::<Vec<_>>(),
        [(Some(0), 0), (None, 0), (Some(0), 1)]
    );
}

#[test]
fn lists_and_runs_of_ids_are_the_same() {
    let line = |blocks: &str| {
        format!("{{\"arrival_s\":0,\"input_tokens\":99,\"output_tokens\":1,{blocks},\"session\":\"a\",\"turn\":4}}\n")
    };
    let header = "{\"trace\":\"mine\",\"block_size\":20}\n";
    let [list, runs] = ["\"block_hashes\":[7,8,9,2,3]", "\"block_runs\":[[7,3],[2,2]]"].map(line);
    let trace = read(format!("{header}{list}").as_bytes()).expect("a list").trace;
    assert_eq!(trace, read(format!("{header}{runs}").as_bytes()).expect("runs").trace);
    assert_eq!((trace.name.as_str(), trace.requests[0].turn, trace.requests[0].chain.1), ("mine", 4, 4));
    let given = Trace::read("mine", list.as_bytes(), BlockSize::new(20)).expect("a size");
    assert_eq!(given.trace, trace);
    assert_eq!(block_size_in_meta("m", b"{\"block_size\": 20, \"stats\": {}}"), Ok(BlockSize::new(20)));
    assert_eq!(block_size_in_meta("m", b"{\"block_size\": null}"), Ok(None));
    for json in ["{\"block_size\": 0}", "{\"block_size\": -1}", "{", "[]", ""] {
        assert!(block_size_in_meta("m", json.as_bytes()).is_err(), "{json}");
    }
}

#[test]
fn what_is_wrong_is_one_line_with_its_number() {
    const GOOD: &str = "{\"arrival_s\":1.5,\"input_tokens\":40,\"output_tokens\":7,\"block_hashes\":[1,2,3]}";
    let header = "{\"block_size\":16}";
    let own = |line: &str| format!("{header}\n{GOOD}\n{line}\n");
    let azure = |line: &str| format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{line}\n");
    let burst = |line: &str| format!("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n{line}\n");
    let cases: [(String, &str); 38] = [
        (own(&GOOD.replace("1.5", "1.4")), "line 3: arrival_s is 1.4 s, before the 1.5 s of the request above\nsort"),
        (own(&GOOD.replace("1.5", "-1.5")), "line 3: arrival_s is -1.5\na time is finite"),
        (own(&GOOD.replace("1.5", "1e300")), "line 3: arrival_s is 1"),
        (own(&GOOD.replace("1.5", "1e999")), "line 3: number out of range at column"),
        (own(&GOOD.replace("1.5", "NaN")), "line 3: expected value at column"),
        (own(&GOOD.replace("1.5", "\"1.5\"")), "line 3: invalid type: string"),
        (own(&GOOD.replace("\"arrival_s\":1.5,", "")), "line 3: missing field `arrival_s`"),
        (own(&GOOD.replace("\"output_tokens\":7,", "")), "line 3: missing field `output_tokens`"),
        (own(&GOOD.replace("40", "0")), "line 3: input_tokens is 0\na request has from 1"),
        (own(&GOOD.replace(":7", ":0")), "line 3: output_tokens is 0\na request has from 1"),
        (own(&GOOD.replace(":7", ":-7")), "line 3: invalid value: integer `-7`"),
        (own(&GOOD.replace(":7", ":7.5")), "line 3: invalid type: floating point"),
        (own(&GOOD.replace("40", "10000001")), "line 3: input_tokens is 10000001\na request"),
        (own(&GOOD.replace("40", "99999999999999")), "line 3: input_tokens is 99999999999999\na request"),
        (own(&GOOD.replace("[1,2,3]", "[1,2]")), "line 3: 2 blocks for 40 tokens: 3 blocks of 16 are expected"),
        (own(&GOOD.replace("[1,2,3]", "[1,2,3,4]")), "line 3: 4 blocks for 40 tokens"),
        (own(&GOOD.replace("[1,2,3]", "[-1,2,3]")), "line 3: invalid value: integer `-1`"),
        (
            own(&GOOD.replace("\"block_hashes\":[1,2,3]", "\"block_runs\":[[0,9000000000000000000]]")),
            "line 3: 9000000000000000000 blocks",
        ),
        (
            own(&GOOD.replace("\"block_hashes\"", "\"block_runs\":[],\"block_hashes\"")),
            "line 3: a request has block_hashes or block_runs",
        ),
        (own("{"), "line 3: EOF while parsing"),
        (own("7"), "line 3: invalid type: integer `7`"),
        (own("\u{0}"), "line 3: expected value"),
        (GOOD.to_owned(), "line 1: the trace has blocks, and nothing says how large"),
        ("{\"block_size\":0}\n".to_owned(), "line 1: block_size is 0\na block has"),
        ("{\"block_size\":\"x\"}\n".to_owned(), "line 1: invalid type: string"),
        (format!("{header}\n"), "t: no requests"),
        (String::new(), "t: no requests"),
        ("\n\n \n".to_owned(), "t: no requests"),
        ("{\"a\":1}".to_owned(), "line 1: no known trace format\nknown are"),
        ("PK\u{3}\u{4}".to_owned(), "line 1: no known trace format"),
        ("TIMESTAMP,ContextTokens\n".to_owned(), "line 1: column GeneratedTokens is missing"),
        ("Model,Request tokens,Response tokens\n".to_owned(), "line 1: column Timestamp is missing"),
        (azure("yesterday,1,2"), "line 2: TIMESTAMP is yesterday\na date"),
        (azure("2023-11-16 18:15:46,1"), "line 2: field GeneratedTokens is missing\nthe line"),
        (azure("2023-11-16 18:15:46,1,-2"), "line 2: GeneratedTokens is -2\ntokens are whole"),
        (burst("x,GPT-4,1,2,3,API log"), "line 2: Timestamp is x\na time is a number"),
        (burst("inf,GPT-4,1,2,3,API log"), "line 2: Timestamp is inf\na time is finite"),
        (
            "{\"timestamp\":1,\"input_length\":5,\"output_length\":1,\"hash_ids\":[1,2]}".to_owned(),
            "line 1: 2 blocks for 5 tokens",
        ),
    ];
    for (text, says) in cases {
        for bytes in [text.clone().into_bytes(), gzipped(&text)] {
            let error = read(&bytes).expect_err(&text).to_string();
            assert!(error.starts_with("t: ") && error.contains(says), "{text}: {error}");
            assert!(error.lines().count() <= 2, "{error}");
        }
    }
    let error = Trace::read("t", header.as_bytes(), BlockSize::new(32)).expect_err("two sizes").to_string();
    assert!(error.contains("block size 32 is given, but the trace says 16"), "{error}");
    let error = read(b"{\"arrival_s\":\xff}").expect_err("no text").to_string();
    assert!(error.contains("line 1: not UTF-8 text"), "{error}");
}

#[test]
fn a_truncated_gzip_says_so() {
    for cut in [3, 12, 20, SMOKE.len() / 2, SMOKE.len() - 9, SMOKE.len() - 1] {
        let error = read(&SMOKE[..cut]).expect_err("cut").to_string();
        assert!(
            error.contains("the gzip stream breaks off") && error.contains("fetch the file again"),
            "{cut}: {error}"
        );
    }
    let mut damaged = SMOKE.to_vec();
    let end = damaged.len() - 6;
    damaged[end] ^= 1;
    assert!(read(&damaged).expect_err("checksum").to_string().contains("gzip"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), size in 0u32..40) {
        drop(Trace::read("any", &bytes, BlockSize::new(size)));
        drop(Trace::read("any", &[&[0x1f, 0x8b], &bytes[..]].concat(), BlockSize::new(size)));
        drop(block_size_in_meta("any", &bytes));
    }

    #[test]
    fn no_cut_or_changed_file_panics(cut in 0..SMOKE.len(), at in 0..SMOKE.len(), bit in 0u32..8) {
        prop_assert!(read(&SMOKE[..cut]).is_err());
        let mut changed = SMOKE.to_vec();
        changed[at] ^= 1 << bit;
        drop(read(&changed));
    }

    #[test]
    fn no_changed_line_panics(at in 0usize..400, junk in "[-0-9a-zA-Z\"{}\\[\\],:. \n]{1,6}", cut in 0usize..6, which in 0usize..4) {
        let texts = [
            "{\"block_size\":16}\n{\"arrival_s\":0,\"input_tokens\":40,\"output_tokens\":7,\"block_runs\":[[1,3]],\"session\":\"a\",\"turn\":2}\n\
             {\"arrival_s\":1.5,\"input_tokens\":40,\"output_tokens\":7,\"block_hashes\":[1,2,3],\"class\":\"x\"}\n",
            "{\"timestamp\": 27000, \"input_length\": 1100, \"output_length\": 3, \"hash_ids\": [5, 6, 7]}\n",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1,3,4\n",
            "Timestamp,Session ID,Model,Request tokens,Response tokens,Log Type\n5,s,ChatGPT,472,18,API log\n6,,G,1,0,API log\n",
        ];
        let mut text = texts[which].to_owned();
        let from = at.min(text.len());
        text.replace_range(from..(from + cut).min(text.len()), &junk);
        if let Ok(reading) = read(text.as_bytes()) {
            // whatever was read can be used
            let trace = reading.trace;
            let stats = trace.stats();
            prop_assert!(stats.requests > 0 && trace.requests.iter().all(|r| r.input > 0 && r.output > 0));
            let scaled = trace.jittered(1).at_rate(9.0, 2).expect("a rate").stats();
            prop_assert!(scaled.requests > stats.requests);
        }
    }
}

#[test]
fn what_two_conversations_share_is_public_and_what_one_repeats_is_not() {
    let line = |at: u32, session: &str, ids: &str| {
        format!(
            "{{\"arrival_s\":{at},\"input_tokens\":4,\"output_tokens\":1,\"session\":\"{session}\",\"block_hashes\":[{ids}]}}\n"
        )
    };
    let text = [line(0, "a", "1,2,3,4"), line(1, "b", "1,2,9,4"), line(2, "a", "1,2,3,4")].concat();
    let trace = read(format!("{{\"block_size\":1}}\n{text}").as_bytes()).expect("a trace").trace;
    let twice = trace.repeated(2).expect("not too many");
    let [first, again] = [0, 3].map(|at| twice.chain(&twice.requests[at]));
    assert_eq!(first, trace.chain(&trace.requests[0]));
    assert_eq!(first[..2], again[..2]);
    assert!(first[2..].iter().all(|name| !again.contains(name)));
    // within a copy, a conversation finds what it had
    assert_eq!(again, twice.chain(&twice.requests[5]));
    let sessions: Vec<_> = twice.requests.iter().map(|request| request.session).collect();
    assert_eq!(sessions, [Some(0), Some(1), Some(0), Some(2), Some(3), Some(2)]);
}

#[test]
fn jitter_and_copies_keep_the_rate() {
    for (name, scale) in [("tau_airline", 9.0), ("mooncake_mixed", 11.0)] {
        let trace = packed(name);
        let rate = trace.jittered(2).at_rate(scale, 2).expect("a rate").stats().rate / trace.stats().rate;
        assert!((rate / scale - 1.0).abs() < 0.03, "{name}: {rate}");
    }
}
