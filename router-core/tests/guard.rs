//! The hotspot guard beside one that counts everything anew, and in a burst made for it.

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use router_core::{
    BlockHash, BlockSize, Blocks, Choice, Config, Decision, DecisionId, Epoch, Event, Guarding, Layout, Micros, Mode,
    ModelSpec, NewRequest, PolicyName, Prompt, RequestId, Router, Scheduler, Tokens, WorkerId, WorkerMessage,
    WorkerSpec, hash_blocks,
};

const SIZE: u64 = 16;

fn router(workers: usize) -> Router {
    let mut router = Router::new(BlockSize::new(SIZE as u32).expect("not zero")).with_guard(Guarding::Filter);
    for at in 0..workers {
        router.add_worker(&at.to_string(), None).expect("a new name");
    }
    router
}

/// A prompt of `shared` blocks of a class, then `own` of its own, then one token.
fn prompt(class: u64, shared: u64, request: u64, own: u64) -> Prompt {
    let of_class = (0..shared).map(|at| BlockHash(class << 32 | at));
    let chain: Vec<_> = of_class.chain((0..own).map(|at| BlockHash(1 << 63 | request << 20 | at))).collect();
    let tokens = Tokens((shared + own) * SIZE + 1);
    Prompt::named(BlockHash(0), &chain, tokens, BlockSize::new(SIZE as u32).expect("not zero"))
}

/// Decisions that live for so many decisions; a prompt is computed by the next one.
struct Fleet {
    router: Router,
    policy: PolicyName,
    alive: VecDeque<DecisionId>,
    residence: usize,
}

impl Fleet {
    fn new(workers: usize, residence: usize) -> Self {
        Self { router: router(workers), policy: PolicyName::Product, alive: VecDeque::new(), residence }
    }

    fn takes(&mut self, prompt: Prompt) -> Choice {
        if self.alive.len() == self.residence {
            self.alive.pop_front().map(|id| self.router.finished(id, &[]));
        }
        let choice = self.router.route(prompt, &*self.policy.policy(0), true).expect("a worker");
        if let Some(last) = self.alive.back() {
            self.router.prefilled(*last);
        }
        self.alive.extend(choice.id);
        choice
    }
}

/// The deepest prefix of the prompt that two requests of the window for each worker begin with, and how many do.
fn class_of(window: &[Prompt], prompt: &Prompt, workers: usize) -> Option<(usize, u32)> {
    let begin = |depth: usize| {
        window.iter().filter(|other| other.chain().get(depth - 1) == prompt.chain().get(depth - 1)).count()
    };
    let depth = (1..=prompt.chain().len()).rev().find(|&depth| begin(depth) >= 2 * workers)?;
    Some((depth, begin(depth) as u32))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Classes of any share and depth, over workers of which some hold them: the guard counts as one that keeps
    /// everything, and where a class is safe by Eq. 2 of arXiv 2603.15202 no holder is ever filtered.
    #[test]
    fn property_5_what_is_safe_is_never_filtered(
        workers in 1usize..6, residence in 1usize..60,
        requests in prop::collection::vec((0u64..4, 0u64..7, 0u64..3), 1..400),
        policy in prop::sample::select(PolicyName::ALL.to_vec()),
    ) {
        let mut fleet = Fleet::new(workers, residence);
        fleet.policy = policy;
        let mut window: Vec<Prompt> = Vec::new();
        let mut went_elsewhere = 0;
        for (at, (class, shared, own)) in requests.into_iter().enumerate() {
            let prompt = prompt(class, shared, at as u64, own);
            let choice = fleet.takes(prompt.clone());
            let expected = class_of(&window, &prompt, workers);
            let seen = choice.guard.map(|sighting| (sighting.depth.0 as usize, sighting.requests));
            prop_assert_eq!(seen, expected, "of {} in the window", window.len());
            let filtered: Vec<_> = choice.seen.candidates.iter().map(|candidate| candidate.filtered).collect();
            if let Some(sighting) = choice.guard {
                prop_assert_eq!(sighting.window as usize, window.len());
                let safe = u64::from(sighting.requests) * workers as u64
                    <= u64::from(sighting.holders) * u64::from(sighting.window);
                prop_assert!(!(safe && (sighting.alarm || sighting.filtered)), "{sighting:?}");
                prop_assert!(sighting.holders == 0 || (sighting.pressure() <= 1.0 + 1e-9) == safe);
                // who is filtered is a holder, and never the one that got it
                let held = filtered.iter().filter(|filtered| **filtered).count();
                prop_assert_eq!(held, if sighting.filtered { sighting.holders as usize } else { 0 });
                went_elsewhere += u64::from(sighting.filtered);
            } else {
                prop_assert!(!filtered.contains(&true));
            }
            prop_assert!(!choice.chosen().filtered);
            window.push(prompt);
            if window.len() > 16 * workers {
                window.remove(0);
            }
        }
        let hotspots = fleet.router.hotspots().expect("a guard");
        prop_assert_eq!(hotspots.filtered, went_elsewhere);
        prop_assert!(hotspots.alarmed >= hotspots.filtering && hotspots.alarmed <= hotspots.alarms);
    }
}

/// Half of all requests come to share 8,192 tokens that one of 16 workers holds.
#[test]
fn property_5_a_burst_is_filtered_until_it_is_safe() {
    for workers in [8u64, 16, 64] {
        let mut fleet = Fleet::new(workers as usize, 16 * workers as usize);
        let mut id = 0;
        let mut next = |hot: bool| {
            id += 1;
            if hot { prompt(1, 512, id, 2) } else { prompt(0, 0, id, 60) }
        };
        for _ in 0..32 * workers {
            let choice = fleet.takes(next(false));
            assert_eq!(choice.guard, None, "prompts that share nothing are no class");
        }
        let (mut of_class, mut alarmed_at, mut filtered_at, mut safe_at) = (0u32, None, None, None);
        let mut holders = 0;
        for at in 0..60 * workers {
            let hot = at % 2 == 0;
            let choice = fleet.takes(next(hot));
            let Some(sighting) = choice.guard.filter(|_| hot) else { continue };
            of_class += 1;
            if sighting.alarm {
                alarmed_at.get_or_insert((of_class, sighting.holders));
            }
            if sighting.filtered {
                filtered_at.get_or_insert(of_class);
                assert!(sighting.holders >= holders, "each makes one more");
                holders = sighting.holders;
            }
            if filtered_at.is_some() && !sighting.alarm {
                safe_at.get_or_insert(of_class);
            }
        }
        let (alarmed_at, first_holders) = alarmed_at.expect("an alarm");
        let filtered_at = filtered_at.expect("filtered");
        assert!(filtered_at - alarmed_at <= 2 * first_holders + 10, "{alarmed_at} {filtered_at}");
        assert!(safe_at.expect("it clears") <= filtered_at + workers as u32, "a holder a request");
        let hotspots = fleet.router.hotspots().expect("a guard");
        assert_eq!((hotspots.alarmed, hotspots.filtering), (0, 0), "it stays clear");
        assert!(hotspots.filtered <= workers / 2, "no more than it takes: {hotspots:?}");
    }
}

/// Four workers, one of which holds 2,048 tokens that every other request begins with; no row ever runs.
fn scheduler(policy: PolicyName, guard: Guarding) -> Scheduler {
    let block_size = BlockSize::new(SIZE as u32).expect("not zero");
    let model = ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size, vocab: 10_000 };
    let config = Config { policy, mode: Mode::Slice, slice_len: None, seed: 0, max_rows: 1000 };
    let mut scheduler = Scheduler::new(model.clone(), config).with_guard(guard);
    let mut actions = Vec::new();
    let hot: Vec<u32> = (0..2048).collect();
    for slot in 0..4 {
        let (worker, epoch, name) = (WorkerId(slot), Epoch(1), format!("w{slot}"));
        let spec = WorkerSpec {
            name,
            epoch,
            model: model.clone(),
            blocks: Blocks(1 << 20),
            max_rows: 64,
            max_context: Tokens(1 << 20),
            chunk: Tokens(512),
            layout: Layout::Paged,
            cost: None,
        };
        scheduler.handle(Micros(1), Event::WorkerJoined { worker, spec }, &mut actions);
        let hashes = if slot == 0 { hash_blocks(BlockHash(0), &hot, block_size) } else { Vec::new() };
        let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes };
        scheduler.handle(Micros(1), Event::Worker { worker, epoch, seq: 1, message }, &mut actions);
    }
    for id in 0..80u64 {
        let own = 5000 + id as u32;
        let prompt: Arc<[u32]> =
            if id % 2 == 0 { hot.iter().copied().chain([own]).collect() } else { [own; 40].into() };
        let (choices, max_tokens) = (1, Tokens(100));
        let request = NewRequest { id: RequestId(id), prompt, root: BlockHash(0), choices, max_tokens, urgent: false };
        scheduler.handle(Micros(id * 100_000), Event::RequestArrived(request), &mut actions);
    }
    scheduler
}

#[test]
fn the_scheduler_guards_and_its_records_explain_it() {
    for policy in [PolicyName::Product, PolicyName::ProductAnticipating] {
        let scheduler = scheduler(policy, Guarding::Filter);
        let hotspots = scheduler.hotspots().expect("a guard");
        assert!(hotspots.alarms >= 1 && hotspots.filtered >= 1, "{policy}: {hotspots:?}");
        let was_filtered = |decision: &&Decision| decision.guard.is_some_and(|sighting| sighting.filtered);
        let filtered: Vec<_> = scheduler.decisions().filter(was_filtered).collect();
        assert_eq!(filtered.len() as u64, hotspots.filtered);
        for decision in filtered {
            let sighting = decision.guard.expect("filtered");
            assert_eq!(sighting.depth, Blocks(112), "of 128 shared blocks: the depth of the ladder before");
            let held = decision.candidates.iter().filter(|candidate| candidate.filtered);
            assert_eq!(held.count() as u32, sighting.holders);
            assert!(!decision.chosen().expect("the winner").filtered && sighting.preferred && sighting.alarm);
        }
        for decision in scheduler.decisions() {
            assert_eq!(decision.recompute(), Some(decision.worker), "{decision:?}");
        }
        let last = scheduler.decisions().last().expect("eighty").anticipation;
        let anticipating = policy == PolicyName::ProductAnticipating;
        assert_eq!(
            (last.arrivals_a_second() - 2.5).abs() < 0.05,
            anticipating,
            "ten a second at four workers: {last:?}"
        );
        assert_eq!(last.seconds_a_token() > 0.0, anticipating);
    }
    let unguarded = self::scheduler(PolicyName::Product, Guarding::Off);
    assert_eq!(unguarded.hotspots(), None);
    assert!(unguarded.decisions().all(|decision| decision.guard.is_none()));
}

/// Whoever only asks gets the answer that he would get if he meant it, and the next decision is what it would be without him.
#[test]
fn questions_move_neither_the_guard_nor_the_rate() {
    for policy in [PolicyName::Product, PolicyName::ProductAnticipating] {
        let mut fleets = [0, 1].map(|_| Fleet { policy, ..Fleet::new(8, 1000) });
        for at in 0..600u64 {
            let prompt = if at % 2 == 0 { prompt(1, 512, at, 2) } else { prompt(0, 0, at, 60) };
            let now = Micros(at * 300_000);
            for fleet in &mut fleets {
                fleet.router.advance(now);
            }
            let [asked, left_alone] = &mut fleets;
            let questions =
                [0, 1].map(|_| asked.router.route(prompt.clone(), &*policy.policy(0), false).expect("a worker"));
            let (meant, alone) = (asked.takes(prompt.clone()), left_alone.takes(prompt));
            assert_eq!(meant, alone);
            for question in questions {
                assert_eq!((question.id, question), (None, Choice { id: None, ..meant.clone() }));
            }
        }
        let [one, other] = fleets.map(|fleet| fleet.router.hotspots().expect("a guard"));
        assert!(one.filtered > 0 && one == other, "{one:?} {other:?}");
    }
    let explained = |times: usize| {
        let mut scheduler = scheduler(PolicyName::ProductAnticipating, Guarding::Filter);
        let prompt: Vec<u32> = (0..2048).collect();
        // even of a time to come
        (0..times).for_each(|_| drop(scheduler.route(Micros(900_000_000), &prompt, BlockHash(0))));
        let decision = scheduler.route(Micros(8_000_000), &prompt, BlockHash(0)).expect("a worker");
        (decision, scheduler.hotspots())
    };
    assert_eq!(explained(0), explained(100));
}

/// Rows that come back are placed again, with the guard: what it says it did is what its records say.
#[test]
fn rows_of_a_lost_worker_are_guarded_and_told() {
    let mut scheduler = scheduler(PolicyName::Product, Guarding::Filter);
    let before = scheduler.decisions().count();
    let mut actions = Vec::new();
    scheduler.handle(Micros(9_000_000), Event::WorkerLost { worker: WorkerId(0), epoch: Epoch(1) }, &mut actions);
    let told: Vec<Decision> = scheduler.decisions().cloned().collect();
    let again = &told[before..];
    let was_filtered = |decision: &&Decision| decision.guard.is_some_and(|sighting| sighting.filtered);
    assert!(again.iter().any(|decision| was_filtered(&decision)), "of {} that were placed again", again.len());
    assert_eq!(scheduler.hotspots().expect("a guard").filtered, told.iter().filter(was_filtered).count() as u64);
    assert!(told.iter().all(|decision| decision.recompute() == Some(decision.worker)));
    // the window has each request once
    assert!(told.iter().filter_map(|decision| decision.guard).all(|sighting| sighting.window <= 64));
}

/// What watches decides as nobody does, and sees more than it would if holders were filtered.
#[test]
fn a_watch_sees_the_burst_as_it_is_without_a_guard() {
    let burst = |guarding: Guarding| {
        let mut fleet = Fleet::new(16, 256);
        fleet.router = Router::new(BlockSize::new(SIZE as u32).expect("not zero")).with_guard(guarding);
        (0..16).for_each(|slot| fleet.router.add_worker(&slot.to_string(), None).expect("a new name"));
        let next = |at| if at % 2 == 0 && at >= 256 { prompt(1, 512, at, 2) } else { prompt(0, 0, at, 60) };
        let choices: Vec<Choice> = (0..1500).map(|at| fleet.takes(next(at))).collect();
        (choices, fleet.router.hotspots())
    };
    let (bare, none) = burst(Guarding::Off);
    let (watched, seen) = burst(Guarding::Watch);
    let (_, filtered) = burst(Guarding::Filter);
    assert_eq!(none, None);
    let (seen, filtered) = (seen.expect("a guard"), filtered.expect("a guard"));
    assert!(seen.alarms >= 1 && seen.filtered == 0 && seen.filtering == 0 && filtered.filtered >= 1, "{seen:?}");
    let alarm = |choice: &Choice| choice.guard.is_some_and(|sighting| sighting.alarm && !sighting.filtered);
    assert!(watched.iter().filter(|choice| alarm(choice)).count() > 100, "nobody ends it");
    for (bare, watched) in bare.into_iter().zip(watched) {
        assert_eq!(bare, Choice { guard: None, ..watched });
    }
}
