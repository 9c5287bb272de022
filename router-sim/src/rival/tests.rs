//! One case table for all: (policy, workers, winner), each worked out by hand.

use proptest::prelude::*;
use router_core::{
    BlockHash, BlockSize, Blocks, Candidate, CostModel, Micros, PagedPrefill, PagedStep, Seen, Tokens, WorkerId, least,
};

use super::{Engine, Rival, Sight, make, names};
use crate::device::Device;
use crate::timing::Law;

/// 1 ms a prefill token; 10 ms an iteration and 1 ms more a decoding row; chunks of 1,000.
pub(super) fn device() -> Device {
    let prefill = PagedPrefill { constant: 0.0, per_token: 1e-3, per_pair: 0.0 };
    let step = PagedStep { constant: 10e-3, per_row: 1e-3, per_context: 0.0 };
    Device {
        name: "test".to_owned(),
        law: Law::Linear(CostModel::Paged { prefill, step }),
        kv: Tokens(16_000),
        chunk: 1000,
        max_rows: 256,
        host: Micros::ZERO,
        start: Micros::ZERO,
    }
}

/// A worker of a case.
#[derive(Clone, Copy, Debug)]
struct W {
    hit: u64,
    queued: u64,
    running: u64,
    waiting: u64,
    tokens: u64,
    used: u64,
    cached: u64,
}

/// An idle one.
const IDLE: W = W { hit: 0, queued: 0, running: 0, waiting: 0, tokens: 0, used: 0, cached: 0 };

impl W {
    const fn hit(self, hit: u64) -> Self {
        Self { hit, ..self }
    }
    const fn queued(self, queued: u64) -> Self {
        Self { queued, ..self }
    }
    const fn rows(self, running: u64) -> Self {
        Self { running, ..self }
    }
    const fn waiting(self, waiting: u64) -> Self {
        Self { waiting, ..self }
    }
    const fn tokens(self, tokens: u64) -> Self {
        Self { tokens, ..self }
    }
    const fn blocks(self, used: u64, cached: u64) -> Self {
        Self { used, cached, ..self }
    }
}

/// A prompt of 1,000 tokens in blocks of 10, so that hits can be any multiple of 10.
const LENGTH: u64 = 1000;

/// A request of a case.
#[derive(Clone, Debug, Default)]
struct Ask {
    at: u64,
    session: Option<u32>,
    turn: u32,
    class: u16,
    chain: Vec<BlockHash>,
    decision: u64,
}

/// Asks once; the choice is told to the rival.
fn ask(rival: &mut dyn Rival, workers: &[W], ask: &Ask) -> usize {
    let candidates = workers.iter().enumerate().map(|(at, w)| Candidate {
        worker: WorkerId(at as u32),
        new_tokens: Tokens((LENGTH - w.hit).max(1)),
        queued: Tokens(w.queued),
        batch_size: w.running + w.waiting,
        ..Candidate::default()
    });
    let names = workers.iter().enumerate().map(|(at, _)| at.to_string().into()).collect();
    let seen =
        Seen { tokens: Tokens(LENGTH), turn: ask.decision, candidates: candidates.collect(), names, ..Seen::default() };
    let engines: Vec<Engine> = workers
        .iter()
        .map(|w| Engine {
            running: w.running,
            waiting: w.waiting,
            tokens: Tokens(w.tokens),
            used: Blocks(w.used),
            cached: Blocks(w.cached),
            blocks: Blocks(1000),
        })
        .collect();
    let sight = Sight {
        now: Micros(ask.at),
        seen: &seen,
        engines: &engines,
        session: ask.session,
        turn: ask.turn,
        class: ask.class,
        chain: &ask.chain,
        size: BlockSize::new(10).expect("not zero"),
    };
    let mut scores = Vec::new();
    rival.scores(&sight, &mut scores);
    assert_eq!(scores.len(), workers.len(), "{}", rival.name());
    let at = least(seen.view(), &scores).expect("workers");
    rival.chosen(&sight, at);
    at
}

fn named(name: &str) -> Box<dyn Rival> {
    make(name, &device(), 4, 7).unwrap_or_else(|error| panic!("{error}"))
}

fn winner(name: &str, workers: &[W]) -> usize {
    ask(&mut *named(name), workers, &Ask::default())
}

#[test]
fn one_table_for_all() {
    let table: &[(&str, &[W], usize)] = &[
        // 4 * 1 + 0 against 4, 3 and 5 that run
        ("jsq", &[IDLE.waiting(1), IDLE.rows(3)], 1),
        ("jsq", &[IDLE.waiting(1), IDLE.rows(4)], 0),
        ("jsq", &[IDLE.waiting(1), IDLE.rows(5)], 0),
        // 300 + 700 against 0 + 1000, then 310 + 700
        ("least_wait_token", &[IDLE.queued(300).hit(300), IDLE], 0),
        ("least_wait_token", &[IDLE.queued(310).hit(300), IDLE], 1),
        // 50 + 400 against 449 and 451; hits do not count
        ("least_token_load", &[IDLE.queued(50).tokens(400).hit(900), IDLE.tokens(449)], 1),
        ("least_token_load", &[IDLE.queued(50).tokens(400), IDLE.tokens(451).hit(900)], 0),
        // whatever the load
        ("most_hit", &[IDLE.hit(20).rows(100).queued(9000), IDLE.hit(10)], 0),
        // out of bounds from 2,048 on
        ("bounded_most_hit", &[IDLE.hit(900).queued(2047), IDLE], 0),
        ("bounded_most_hit", &[IDLE.hit(900).queued(2048), IDLE], 1),
        // all are: 3000 + 100 against 2500 + 1000
        ("bounded_most_hit", &[IDLE.hit(900).queued(3000), IDLE.queued(2500)], 0),
        ("bounded_most_hit", &[IDLE.hit(900).queued(3410), IDLE.queued(2500)], 1),
        // .7 * (1 - .4) + .3 * 10/10 = .72 against .7 + .3 * 0 = .7; .7 * .5 + .3 = .65
        ("linear", &[IDLE.hit(400).rows(10), IDLE], 1),
        ("linear", &[IDLE.hit(500).rows(10), IDLE], 0),
        // half each: .5 * .1 + .5 = .55 against .5
        ("linear@0.5", &[IDLE.hit(900).rows(10), IDLE], 1),
        ("linear@0.8", &[IDLE.hit(900).rows(10), IDLE], 0),
        ("linear@0", &[IDLE.hit(900).rows(1), IDLE], 1),
        ("linear@1", &[IDLE.hit(10).rows(99), IDLE], 0),
        // .7 * .4 = .28 against .15 + .15; .7 * .5 = .35
        ("bailian", &[IDLE.hit(400).rows(4).tokens(4000), IDLE], 1),
        ("bailian", &[IDLE.hit(500).rows(4).tokens(4000), IDLE], 0),
        // (0 + 500)/10 + (490 + 1000)/10 = 199 against 100 + 100; 510: 201
        ("dynamo", &[IDLE.hit(500).tokens(490), IDLE], 0),
        ("dynamo", &[IDLE.hit(500).tokens(510), IDLE], 1),
        // twice: 100 + 190 against 200 + 100; 210: 100 + 210
        ("dynamo@2", &[IDLE.hit(500).tokens(900), IDLE], 0),
        ("dynamo@2", &[IDLE.hit(500).tokens(1100), IDLE], 1),
        // without decay as dynamo@1
        ("dynamo_2026", &[IDLE.hit(500).tokens(490), IDLE], 0),
        ("dynamo_2026", &[IDLE.hit(500).tokens(510), IDLE], 1),
        // a backlog of half a prompt: 150 - 50 = 100 blocks and all of its 100 against 200; with a decay of 1 the credit is 33
        ("dynamo_2026", &[IDLE.hit(510).queued(500), IDLE], 0),
        ("dynamo_2026@1", &[IDLE.hit(510).queued(500), IDLE], 1),
        // -2 * .3 + .4 + 0/1 = -.2 against 0; .3 used: -.3; waiting 1 of 1: +1
        ("dynamo_first", &[IDLE.hit(300).blocks(400, 0), IDLE], 0),
        ("dynamo_first", &[IDLE.hit(300).blocks(610, 0), IDLE], 1),
        ("dynamo_first", &[IDLE.hit(400).waiting(1), IDLE], 1),
        ("dynamo_first", &[IDLE.hit(600).waiting(1), IDLE], 0),
        // more than half held: .5 is not
        ("sglang", &[IDLE.hit(510).rows(5), IDLE], 0),
        ("sglang", &[IDLE.hit(500).rows(5), IDLE], 1),
        ("sglang_cli", &[IDLE.hit(310).rows(5), IDLE], 0),
        ("sglang_cli", &[IDLE.hit(300).rows(5), IDLE], 1),
        // 32 apart is balanced, 33 is not; 363 <= 1.1 * 330 is, 364 is not
        ("sglang", &[IDLE.hit(900).rows(32), IDLE], 0),
        ("sglang", &[IDLE.hit(900).rows(33), IDLE], 1),
        ("sglang", &[IDLE.hit(900).rows(363), IDLE.rows(330)], 0),
        ("sglang", &[IDLE.hit(900).rows(364), IDLE.rows(330)], 1),
        ("sglang_cli", &[IDLE.hit(900).rows(64), IDLE], 0),
        ("sglang_cli", &[IDLE.hit(900).rows(65), IDLE], 1),
        // mean 2, deviation 2: a b of 4 is within them. Of three, mean 2, deviation 2.83: 6 is not within 4.83
        ("aibrix", &[IDLE.hit(100).rows(4), IDLE], 0),
        ("aibrix", &[IDLE.hit(100).rows(6), IDLE, IDLE], 1),
        // the higher match, of equals the lower b
        ("aibrix", &[IDLE.hit(100), IDLE.hit(200).rows(1)], 1),
        ("aibrix", &[IDLE.hit(200).rows(2), IDLE.hit(200).rows(1)], 1),
        // of five, 15 and 0: mean 3, deviation 6: 15 > 8 and 15 apart; only idle ones are asked, one of which holds a little
        ("aibrix", &[IDLE.hit(900).rows(15), IDLE, IDLE, IDLE.hit(10), IDLE], 3),
        // 3 * .7 = 2.1 against 2 * 1; 3 * .6 = 1.8
        ("llm_d", &[IDLE.hit(700).waiting(3), IDLE], 0),
        ("llm_d", &[IDLE.hit(600).waiting(3), IDLE], 1),
        // rows that run are not its queue
        ("llm_d", &[IDLE.hit(10).rows(99), IDLE], 0),
        // a hit above all others is 10, and waiting at most .5
        ("llm_d_10_1", &[IDLE.hit(10).waiting(500), IDLE], 0),
        ("llm_d_10_1", &[IDLE.waiting(1), IDLE], 1),
        ("llm_d_10_1", &[IDLE.waiting(128).rows(1), IDLE.waiting(900)], 0),
        // 500 + 400 tokens in one iteration: .91 s; 1,000: 1.01 s. With 700 queued: 1.1 s in two
        ("min_ttft", &[IDLE.queued(500).hit(600), IDLE], 0),
        ("min_ttft", &[IDLE.queued(700).hit(600), IDLE], 1),
        // 50 rows beside it: 900 tokens take .96 s. With 150 of them: 850 and 50, in all .9 + .32 s
        ("min_ttft", &[IDLE.hit(100).rows(50), IDLE], 0),
        ("min_ttft", &[IDLE.hit(100).rows(150), IDLE], 1),
        // which a worker that only prefills does not see
        ("mooncake", &[IDLE.hit(100).rows(150), IDLE], 0),
        ("mooncake", &[IDLE.queued(700).hit(600), IDLE], 1),
        // more than half held, whatever the load; half is explored: a free worker, the other evicts 50 blocks that were never hit
        ("preble", &[IDLE.hit(510).rows(90).blocks(1000, 0), IDLE], 0),
        ("preble", &[IDLE.hit(500).blocks(1000, 0), IDLE], 0),
        // without sessions: nobody was sent anything, so the first
        ("stack_session", &[IDLE.rows(9), IDLE], 0),
        ("stack_prefixaware", &[IDLE], 0),
        // 990 matched of 1,000: not short by 2,000
        ("stack_kvaware", &[IDLE, IDLE.hit(10).rows(99)], 1),
        // (1000 - 500)/5 = 100 against (1000 - 600)/4 = 100, 99.8 and 100.25
        ("llumnix", &[IDLE.rows(5).blocks(500, 0), IDLE.rows(4).blocks(601, 0)], 0),
        ("llumnix", &[IDLE.rows(5).blocks(500, 0), IDLE.rows(4).blocks(599, 0)], 1),
        // 10 queued tokens are a block of it; what is cached and unused is free
        ("llumnix", &[IDLE.rows(5).blocks(500, 0), IDLE.rows(4).blocks(600, 400).queued(10)], 0),
        // 10 + 40 ms a token is the last that meets 50 ms: 39 rows and this one
        ("polyserve", &[IDLE.rows(39), IDLE.rows(2)], 0),
        ("polyserve", &[IDLE.rows(40), IDLE.rows(2)], 1),
        // 3,900 + 1,000 tokens in 5 iterations: 4.95 s; 4,000: 5.05 s
        ("polyserve", &[IDLE.queued(3900).rows(1).hit(10), IDLE], 0),
        ("polyserve", &[IDLE.queued(4000).rows(1), IDLE], 1),
        // without sessions a later turn is one of which more than half is held; up to half the product: 500 * 2 against 1000
        // without a session a first turn: 490 * 10 against 1,000
        ("smetric", &[IDLE.hit(510).rows(9), IDLE], 1),
        ("smetric", &[IDLE.hit(510).rows(1), IDLE], 0),
        // or a guess
        ("smetric_held", &[IDLE.hit(510).rows(9), IDLE], 0),
        ("smetric_held", &[IDLE.hit(490).rows(1), IDLE], 1),
        ("sticky", &[IDLE.rows(1).hit(900), IDLE], 1),
        ("d2lpm", &[IDLE.rows(1).hit(900), IDLE], 0),
        // a slice of 128 iterations of 10 + b + 1 ms: a row is .128 s, as much as 118 queued tokens and their iteration
        ("scls_lpt", &[IDLE.rows(1), IDLE.queued(119)], 0),
        ("scls_lpt", &[IDLE.rows(1), IDLE.queued(117)], 1),
        // (1.01 + 64 * .011) * 1 = 1.714 against (.11 + 64 * .012) * 2 = 1.756; all but 20 held: (.03 + .768) * 2 = 1.596
        ("product_time", &[IDLE, IDLE.hit(900).rows(1)], 0),
        ("product_time", &[IDLE, IDLE.hit(980).rows(1)], 1),
        // 1.01 against .5 * 2 + .02 and .4 * 2 + .02
        ("product_seconds", &[IDLE, IDLE.hit(500).rows(1)], 0),
        ("product_seconds", &[IDLE, IDLE.hit(600).rows(1)], 1),
        // without Q the queue is free
        ("product_hit_ratio", &[IDLE.hit(500).queued(9000), IDLE], 0),
        ("product_hit_ratio", &[IDLE.hit(490).rows(1), IDLE], 1),
        // 500 * (900 + 1000) against 1000 * 1000, then 1100
        ("product_tokens", &[IDLE.hit(500).rows(9).tokens(900), IDLE], 0),
        ("product_tokens", &[IDLE.hit(500).tokens(1100), IDLE], 1),
        // nobody there: zero, whatever the queue
        ("product_plain_batch", &[IDLE.hit(990).rows(1), IDLE.queued(9000)], 1),
        ("product_plain_batch", &[IDLE.hit(510).rows(2), IDLE.rows(1)], 0),
        // 600 + 100 * 4 = 1000 against 1000: the product would say 700 * 4
        ("product_sum", &[IDLE.hit(900).rows(3).queued(590), IDLE], 0),
        ("product_sum", &[IDLE.hit(900).rows(3).queued(610), IDLE], 1),
        ("product_first_tie", &[IDLE, IDLE], 0),
        ("product_first_tie", &[IDLE.rows(1), IDLE], 1),
        // the core's, through the same door
        ("product", &[IDLE.hit(510).rows(1), IDLE], 0),
        ("product", &[IDLE.hit(490).rows(1), IDLE], 1),
        ("least_requests", &[IDLE.hit(900).rows(1), IDLE], 1),
        // nobody is expected: the product
        ("product_anticipating", &[IDLE.hit(510).rows(1), IDLE], 0),
        ("product_anticipating", &[IDLE.hit(490).rows(1), IDLE], 1),
    ];
    for (name, workers, wins) in table {
        assert_eq!(winner(name, workers), *wins, "{name}: {workers:?}");
    }
    // nobody is left out but those that draw and those with a memory, which have tests of their own below
    let elsewhere = ["power_of_two", "random", "round_robin", "dynamo_softmax", "dual_map"];
    for name in names() {
        let tried = table.iter().any(|(tried, _, _)| tried.split('@').next() == Some(name));
        assert!(tried || elsewhere.contains(&name), "{name} is in no case");
    }
}

/// So many decisions of one rival over the same workers.
fn counts(name: &str, workers: &[W], decisions: u64) -> Vec<u64> {
    let mut rival = named(name);
    let mut counts = vec![0; workers.len()];
    for decision in 0..decisions {
        counts[ask(&mut *rival, workers, &Ask { decision, ..Ask::default() })] += 1;
    }
    counts
}

#[test]
fn what_is_drawn_is_drawn_with_its_weights() {
    // the busiest of four never wins a draw of two others, the idlest wins half of all pairs
    let counts_of = counts("power_of_two", &[IDLE.rows(3), IDLE.rows(2), IDLE.rows(1), IDLE], 6000);
    assert_eq!(counts_of[0], 0);
    let wanted = [0, 1000, 2000, 3000];
    assert!(counts_of.iter().zip(wanted).all(|(&is, want)| is.abs_diff(want) < 200), "{counts_of:?}");
    // costs of 200, 300 and 400 blocks at T = .5: exp(0), exp(-1), exp(-2)
    let drawn = counts("dynamo_softmax", &[IDLE, IDLE.queued(1000), IDLE.queued(2000)], 6000);
    let wanted = [3991, 1468, 540];
    assert!(drawn.iter().zip(wanted).all(|(&is, want)| is.abs_diff(want) < 150), "{drawn:?}");
    assert!(counts("dynamo_softmax", &[IDLE; 3], 3000).iter().all(|is| is.abs_diff(1000) < 150));
    // nobody meets an objective: any
    assert!(counts("polyserve", &[IDLE.rows(90); 3], 3000).iter().all(|is| is.abs_diff(1000) < 150));
    // the same seed, the same draws
    assert_eq!(counts("power_of_two", &[IDLE; 5], 500), counts("power_of_two", &[IDLE; 5], 500));
}

fn chain(names: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    names.into_iter().map(BlockHash).collect()
}

#[test]
fn a_conversation_that_sticks_stays_whatever_the_load() {
    let mut sticky = named("sticky");
    let turn = |session: u32| Ask { session: Some(session), ..Ask::default() };
    assert_eq!(ask(&mut *sticky, &[IDLE.rows(1), IDLE], &turn(5)), 1);
    assert_eq!(ask(&mut *sticky, &[IDLE, IDLE.rows(99)], &turn(5)), 1);
    assert_eq!(ask(&mut *sticky, &[IDLE, IDLE.rows(99)], &turn(6)), 0, "another conversation");
    assert_eq!(ask(&mut *sticky, &[IDLE], &turn(5)), 0, "its worker is gone");
    // without sessions: more than half of the blocks
    let mut sticky = named("sticky");
    let asks = |chain: Vec<BlockHash>| Ask { chain, ..Ask::default() };
    assert_eq!(ask(&mut *sticky, &[IDLE.rows(1), IDLE], &asks(chain(0..4))), 1);
    assert_eq!(ask(&mut *sticky, &[IDLE, IDLE.rows(9)], &asks(chain([0, 1, 2, 3, 14, 15, 16]))), 1);
    assert_eq!(ask(&mut *sticky, &[IDLE, IDLE.rows(9)], &asks(chain([0, 1, 22, 23, 24]))), 0);
}

#[test]
fn a_session_is_hashed_to_one_worker_and_sessions_spread() {
    let mut stack = named("stack_session");
    let mut counts = [0u32; 4];
    for session in 0..4000 {
        let ask_of = Ask { session: Some(session), ..Ask::default() };
        let at = ask(&mut *stack, &[IDLE; 4], &ask_of);
        assert_eq!(ask(&mut *stack, &[IDLE.rows(9); 4], &ask_of), at);
        counts[at] += 1;
    }
    assert!(counts.iter().all(|is| is.abs_diff(1000) < 120), "{counts:?}");
}

#[test]
fn the_least_used_of_the_last_minute_is_next() {
    let mut stack = named("stack_session");
    let at = |seconds: u64| Ask { at: seconds * 1_000_000, ..Ask::default() };
    assert_eq!(ask(&mut *stack, &[IDLE; 2], &at(0)), 0);
    assert_eq!(ask(&mut *stack, &[IDLE; 2], &at(30)), 1);
    assert_eq!(ask(&mut *stack, &[IDLE; 2], &at(60)), 0, "one each");
    assert_eq!(
        ask(&mut *stack, &[IDLE; 2], &at(91)),
        1,
        "both of the first half minute are forgotten, the third is not"
    );
    // a long prompt of which too little is held goes by use, as the table's short one does not
    let mut kvaware = named("stack_kvaware");
    assert_eq!(ask(&mut *kvaware, &[IDLE, IDLE.hit(990)], &at(0)), 1);
}

#[test]
fn what_was_sent_is_remembered_by_prefix() {
    let mut stack = named("stack_prefixaware");
    let asks = |chain: Vec<BlockHash>| Ask { chain, ..Ask::default() };
    let first = ask(&mut *stack, &[IDLE; 4], &asks(chain(0..5)));
    for decision in 0..20 {
        let more = Ask { decision, ..asks(chain((0..5).chain([100 + decision]))) };
        assert_eq!(ask(&mut *stack, &[IDLE.rows(9); 4], &more), first);
    }
}

#[test]
fn a_tree_grows_with_what_is_sent() {
    let mut sglang = named("sglang");
    // nothing matches: trees of 0, then of 1,000 new tokens
    assert_eq!(ask(&mut *sglang, &[IDLE, IDLE], &Ask::default()), 0);
    assert_eq!(ask(&mut *sglang, &[IDLE, IDLE.rows(5)], &Ask::default()), 1);
    // 1,000 each: fewer rows; then 2,000 against 1,400
    assert_eq!(ask(&mut *sglang, &[IDLE.rows(1), IDLE.hit(600)], &Ask::default()), 1);
    assert_eq!(ask(&mut *sglang, &[IDLE.rows(9), IDLE], &Ask::default()), 0);
    assert_eq!(ask(&mut *sglang, &[IDLE, IDLE.rows(9)], &Ask::default()), 1);
}

#[test]
fn a_load_is_forgotten_after_three_minutes() {
    let mut preble = named("preble");
    let at = |seconds: u64| Ask { at: seconds * 1_000_000, ..Ask::default() };
    // 1 s of prefill was sent to each in turn
    assert_eq!(ask(&mut *preble, &[IDLE; 2], &at(0)), 0);
    assert_eq!(ask(&mut *preble, &[IDLE; 2], &at(100)), 1);
    // .61 s with a hit of 400 makes up for no more than that
    assert_eq!(ask(&mut *preble, &[IDLE.hit(400), IDLE.hit(390)], &at(180)), 0);
    assert_eq!(ask(&mut *preble, &[IDLE, IDLE], &at(181)), 0, "what was sent at 0 is forgotten: .61 s against 1.01 s");
    // equal matches above half: the least load, 1.62 s against 1.01 s
    assert_eq!(ask(&mut *preble, &[IDLE.hit(600), IDLE.hit(600)], &at(182)), 1);
}

#[test]
fn rows_that_decode_are_load() {
    let mut preble = named("preble");
    // 45 tokens of 12 ms against the second's hit of 500: .54 s and .5 s
    assert_eq!(ask(&mut *preble, &[IDLE, IDLE.hit(500).rows(1)], &Ask::default()), 0);
    // answers of 10 tokens: .12 s
    let mut preble = named("preble");
    preble.ended(10);
    assert_eq!(ask(&mut *preble, &[IDLE, IDLE.hit(500).rows(1)], &Ask::default()), 1);
    // of equal matches the least load: nothing was sent to the first, .51 s to the second, and 1.8 s of its rows are left
    assert_eq!(ask(&mut *preble, &[IDLE.hit(600).rows(1), IDLE.hit(600)], &Ask::default()), 0, ".12 s against .51 s");
    let mut preble = named("preble");
    assert_eq!(ask(&mut *preble, &[IDLE.hit(600).rows(1), IDLE.hit(600)], &Ask::default()), 1, ".54 s against none");
}

#[test]
fn eviction_counts_as_often_as_what_is_held_is_hit() {
    let mut preble = named("preble");
    let full = IDLE.blocks(0, 1000);
    // hits of 600 of 1,000 on both: 40 blocks of 100 would be evicted for 400 tokens
    assert_eq!(ask(&mut *preble, &[IDLE.hit(600), IDLE], &Ask::default()), 0);
    assert_eq!(ask(&mut *preble, &[IDLE, IDLE.hit(600)], &Ask { decision: 1, ..Ask::default() }), 1);
    // equal loads: new tokens of 900 and .6 of the seconds of 900 evicted, against 1,000 into free blocks
    assert_eq!(ask(&mut *preble, &[full.hit(100), IDLE], &Ask::default()), 1);
}

#[test]
fn later_turns_keep_their_prefix_until_the_wait_is_too_long() {
    let mut smetric = named("smetric");
    let turn = Ask { session: Some(1), turn: 3, ..Ask::default() };
    // its objective is 1.01 s, twice that is the bound
    let late = IDLE.hit(900).queued(1900).rows(1);
    assert_eq!(ask(&mut *smetric, &[late, IDLE], &turn), 1, "2,000 tokens in three iterations with a row: 2.03 s");
    assert_eq!(ask(&mut *smetric, &[IDLE.hit(900).queued(1870), IDLE], &turn), 0, "1.99 s");
    assert_eq!(
        ask(&mut *smetric, &[IDLE.hit(900).queued(1950), IDLE.rows(1)], &turn),
        0,
        "the least b, though it waits"
    );
    let first = Ask { turn: 0, ..turn };
    assert_eq!(ask(&mut *smetric, &[IDLE.hit(900).queued(1870), IDLE], &first), 1, "a first turn goes by the product");
}

#[test]
fn a_prefix_has_two_places_and_takes_the_quicker_when_it_is_late() {
    let mut dual = named("dual_map");
    let asks = |chain: Vec<BlockHash>| Ask { chain, ..Ask::default() };
    let prefix = || chain([7, 8]);
    let at = ask(&mut *dual, &[IDLE; 4], &asks(prefix()));
    // 6,000 tokens are more than 5 s: the other place, which is not late
    let mut busy = [IDLE; 4];
    busy[at] = IDLE.queued(6000);
    let mut dual = named("dual_map");
    let other = ask(&mut *dual, &busy, &asks(prefix()));
    assert_ne!(other, at);
    // both late: the sooner; nobody else is asked
    busy[other] = IDLE.queued(5500);
    let mut dual = named("dual_map");
    assert_eq!(ask(&mut *dual, &busy, &asks(prefix())), other);
    busy[other] = IDLE.queued(6500);
    let mut dual = named("dual_map");
    assert_eq!(ask(&mut *dual, &busy, &asks(prefix())), at);
    // the one that holds more of it, if it is not late
    let mut held = [IDLE; 4];
    held[other] = IDLE.hit(500).queued(4000);
    let mut dual = named("dual_map");
    assert_eq!(ask(&mut *dual, &held, &asks(prefix())), other);
}

#[test]
fn a_prefix_that_all_share_does_not_decide_alone() {
    let mut dual = named("dual_map");
    let mut counts = [0u32; 4];
    for request in 0..400 {
        counts[ask(&mut *dual, &[IDLE; 4], &Ask { chain: chain([7, 1000 + request]), ..Ask::default() })] += 1;
    }
    assert!(counts.iter().all(|&is| is > 50), "{counts:?}");
}

#[test]
fn a_deficit_sends_a_client_elsewhere() {
    let mut d2lpm = named("d2lpm@1000");
    let workers = [IDLE.hit(500), IDLE];
    // 1000 - 500, 500 - 500 = 0, then the other one for 1,000
    let turns: Vec<usize> = (0..4).map(|_| ask(&mut *d2lpm, &workers, &Ask::default())).collect();
    assert_eq!(turns, [0, 0, 1, 0], "and a new quantum for both");
    // a client is none of its conversations
    let mut d2lpm = named("d2lpm@1000");
    let of = |session: u32| Ask { session: Some(session), ..Ask::default() };
    let turns: Vec<usize> = (0..3).map(|session| ask(&mut *d2lpm, &workers, &of(session))).collect();
    assert_eq!(turns, [0, 0, 1], "what one put on a worker counts for the next");
    // another class has deficits of its own
    assert_eq!(ask(&mut *d2lpm, &workers, &Ask { class: 1, ..Ask::default() }), 0);
}

#[test]
fn extremes_are_scored() {
    let worst = W {
        hit: 0,
        queued: u64::MAX / 8,
        running: 1 << 40,
        waiting: 1 << 40,
        tokens: 1 << 50,
        used: 1 << 50,
        cached: 1 << 50,
    };
    for name in names() {
        let mut rival = named(name);
        for workers in [&[worst, IDLE][..], &[worst], &[IDLE], &[worst, worst, IDLE.hit(LENGTH)]] {
            let at = ask(&mut *rival, workers, &Ask { chain: chain(0..100), ..Ask::default() });
            assert!(at < workers.len(), "{name}");
        }
    }
}

/// Any state of a fleet.
fn fleets() -> impl Strategy<Value = Vec<W>> {
    let worker = (0u64..=100, 0u64..5000, 0u64..40, 0u64..10, 0u64..20_000, (0u64..1000, 0u64..1000));
    let worker = worker.prop_map(|(hit, queued, running, waiting, tokens, (used, cached))| W {
        hit: 10 * hit,
        queued,
        running,
        waiting,
        tokens,
        used,
        cached: cached.min(1000 - used),
    });
    proptest::collection::vec(worker, 1..12)
}

proptest! {
    /// Whatever the weight is at its ends, one indicator is left.
    #[test]
    fn a_linear_rule_of_one_side_is_that_side(workers in fleets(), decision in 0u64..20) {
        let asks = Ask { decision, ..Ask::default() };
        let batch = |w: &W| w.running + w.waiting;
        let load = ask(&mut *named("linear@0"), &workers, &asks);
        prop_assert_eq!(batch(&workers[load]), workers.iter().map(batch).min().expect("workers"));
        prop_assert_eq!(load, ask(&mut *named("least_requests"), &workers, &asks));
        let hits = ask(&mut *named("linear@1"), &workers, &asks);
        prop_assert_eq!(hits, ask(&mut *named("most_hit"), &workers, &asks));
    }

    /// Forms that are said to be one are one.
    #[test]
    fn equal_rules_choose_alike(workers in fleets(), decision in 0u64..20) {
        let asks = Ask { decision, ..Ask::default() };
        // the hit of a whole prompt is a token short of it: nothing is below zero
        prop_assert_eq!(
            ask(&mut *named("dynamo_2026"), &workers, &asks), ask(&mut *named("dynamo"), &workers, &asks)
        );
        let idle: Vec<W> = workers.iter().map(|w| W { queued: 0, ..*w }).collect();
        for same in ["product_hit_ratio", "product_sum"] {
            prop_assert_eq!(ask(&mut *named(same), &idle, &asks), ask(&mut *named("product"), &idle, &asks));
        }
    }

    /// A rule that is the least of something does not gain by more of it.
    #[test]
    fn more_to_wait_for_wins_nothing(workers in fleets(), more in 1u64..5000) {
        for name in ["product", "product_time", "product_sum", "least_wait_token", "min_ttft", "mooncake", "dynamo", "llumnix"] {
            let at = winner(name, &workers);
            let mut worse = workers.clone();
            let other = (at + 1) % workers.len();
            worse[other].queued += more;
            if other != at {
                prop_assert_eq!(winner(name, &worse), at, "{}", name);
            }
        }
    }

    /// Decisions over any fleet, remembered: somebody always wins, and the same again.
    #[test]
    fn any_state_is_decided_and_decided_again(
        states in proptest::collection::vec((fleets(), 0u64..50, 0u32..4, proptest::collection::vec(0u64..30, 0..6)), 1..8),
    ) {
        for name in names() {
            let (mut one, mut other) = (named(name), named(name));
            for (decision, (workers, at, session, blocks)) in states.iter().enumerate() {
                let asks = Ask {
                    at: at * 10_000_000 + decision as u64,
                    session: (*session > 0).then_some(*session),
                    turn: decision as u32,
                    class: 0,
                    chain: chain(blocks.iter().copied()),
                    decision: decision as u64,
                };
                prop_assert_eq!(ask(&mut *one, workers, &asks), ask(&mut *other, workers, &asks), "{}", name);
            }
        }
    }
}
