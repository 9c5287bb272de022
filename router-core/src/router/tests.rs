//! The router beside one that keeps lists and counts everything anew at every question.

use proptest::prelude::*;

use super::*;
use crate::block::hash_blocks;
use crate::policy::{PolicyName, Product, choose};

const SIZE: u32 = 4;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn size() -> BlockSize {
    BlockSize::new(SIZE).expect("not zero")
}

/// Ids of one of a few conversations; two share their beginning.
fn ids(conversation: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| if i < 9 { conversation / 2 * 100 + i } else { conversation * 100 + i }).collect()
}

fn hashes(ids: &[u32]) -> Vec<BlockHash> {
    hash_blocks(BlockHash(5), ids, size())
}

fn prompt(ids: &[u32]) -> Prompt {
    Prompt::new(BlockHash(5), ids, size())
}

#[derive(Clone, Debug)]
enum Op {
    Add(usize, Option<u64>),
    Remove(usize),
    Route {
        conversation: u32,
        len: usize,
        commit: bool,
    },
    /// Several, of which the policy scores so many.
    Fail {
        conversation: u32,
        len: usize,
        scored: usize,
    },
    Prefilled(usize),
    Finished(usize, usize),
    TakeBack(usize),
    Report {
        worker: usize,
        conversation: u32,
        len: usize,
        stored: bool,
        cleared: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let (worker, conversation, len) = (0..NAMES.len(), 0u32..4, 1usize..40);
    prop_oneof![
        2 => (worker.clone(), prop::option::of(0u64..12)).prop_map(|(w, blocks)| Op::Add(w, blocks)),
        1 => worker.clone().prop_map(Op::Remove),
        6 => (conversation.clone(), len.clone(), prop::bool::weighted(0.8))
            .prop_map(|(conversation, len, commit)| Op::Route { conversation, len, commit }),
        1 => (conversation.clone(), len.clone(), 0usize..4)
            .prop_map(|(conversation, len, scored)| Op::Fail { conversation, len, scored }),
        3 => (0usize..8).prop_map(Op::Prefilled),
        3 => (0usize..8, 0usize..20).prop_map(|(at, output)| Op::Finished(at, output)),
        1 => (0usize..8).prop_map(Op::TakeBack),
        2 => (worker, conversation, len, any::<bool>(), prop::bool::weighted(0.1)).prop_map(
            |(worker, conversation, len, stored, cleared)| Op::Report { worker, conversation, len, stored, cleared }),
    ]
}

/// Blocks that a worker holds beside the committed ones, least recently used first where they are predicted.
struct NaiveWorker {
    capacity: Option<u64>,
    stored: Vec<BlockHash>,
}

impl NaiveWorker {
    fn used(&mut self, chain: &[BlockHash]) {
        let Some(capacity) = self.capacity else { return };
        for block in chain.iter().rev() {
            self.stored.retain(|held| held != block);
            self.stored.push(*block);
        }
        let over = self.stored.len().saturating_sub(capacity as usize);
        self.stored.drain(..over);
    }
}

struct NaiveFlight {
    id: DecisionId,
    worker: &'static str,
    ids: Vec<u32>,
    new_tokens: u64,
    prefilled: bool,
}

/// Slots in order, empty ones kept.
#[derive(Default)]
struct Naive {
    slots: Vec<Option<(&'static str, NaiveWorker)>>,
    flights: Vec<NaiveFlight>,
    turn: u64,
}

impl Naive {
    fn workers(&self) -> impl Iterator<Item = &(&'static str, NaiveWorker)> {
        self.slots.iter().flatten()
    }

    fn worker(&mut self, name: &str) -> Option<&mut NaiveWorker> {
        self.slots.iter_mut().flatten().find(|(held, _)| *held == name).map(|(_, worker)| worker)
    }

    fn holds(&self, name: &str, worker: &NaiveWorker, block: BlockHash) -> bool {
        worker.stored.contains(&block)
            || self.flights.iter().any(|flight| flight.worker == name && hashes(&flight.ids).contains(&block))
    }

    fn load(&self, name: &str) -> (u64, u64) {
        let own = || self.flights.iter().filter(|flight| flight.worker == name);
        (own().count() as u64, own().filter(|flight| !flight.prefilled).map(|flight| flight.new_tokens).sum())
    }

    /// (new tokens, queued, batch size) of each worker for a prompt.
    fn seen(&self, ids: &[u32]) -> Vec<(u64, u64, u64)> {
        let one = |(name, worker): &(&'static str, NaiveWorker)| {
            let hit = hashes(ids).iter().take_while(|block| self.holds(name, worker, **block)).count() as u64;
            let most = (ids.len() as u64 - 1) / u64::from(SIZE);
            let (batch, queued) = self.load(name);
            (ids.len() as u64 - hit.min(most) * u64::from(SIZE), queued, batch)
        };
        self.workers().map(one).collect()
    }
}

fn check(router: &Router, naive: &Naive) -> Result<(), TestCaseError> {
    let states: Vec<_> = router.workers().collect();
    prop_assert_eq!(states.len(), naive.workers().count());
    for (state, (name, worker)) in states.iter().zip(naive.workers()) {
        prop_assert_eq!(&*state.name, *name);
        prop_assert_eq!((state.batch_size, state.queued.0), naive.load(name));
        let mut held: Vec<_> = worker.stored.clone();
        for flight in naive.flights.iter().filter(|flight| flight.worker == *name) {
            held.extend(hashes(&flight.ids));
        }
        held.sort_unstable();
        held.dedup();
        prop_assert_eq!(state.indexed.0, held.len() as u64, "{}", name);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn it_counts_as_one_that_keeps_lists(ops in prop::collection::vec(op(), 1..80)) {
        let (mut router, mut naive) = (Router::new(size()), Naive::default());
        for op in ops {
            match op {
                Op::Add(w, capacity) => {
                    let known = naive.worker(NAMES[w]).is_some();
                    prop_assert_eq!(router.add_worker(NAMES[w], capacity.map(Blocks)).is_err(), known);
                    if !known {
                        let worker = Some((NAMES[w], NaiveWorker { capacity, stored: Vec::new() }));
                        match naive.slots.iter_mut().find(|slot| slot.is_none()) {
                            Some(slot) => *slot = worker,
                            None => naive.slots.push(worker),
                        }
                    }
                }
                Op::Remove(w) => {
                    prop_assert_eq!(router.remove_worker(NAMES[w]).is_ok(), naive.worker(NAMES[w]).is_some());
                    naive.slots.iter_mut().filter(|slot| matches!(slot, Some((name, _)) if *name == NAMES[w]))
                        .for_each(|slot| *slot = None);
                    naive.flights.retain(|flight| flight.worker != NAMES[w]);
                }
                Op::Route { conversation, len, commit } => {
                    let ids = ids(conversation, len);
                    let answer = router.route(prompt(&ids), &Product, commit);
                    if naive.workers().next().is_none() {
                        prop_assert_eq!(answer, Err(RouterError::NoWorker));
                        continue;
                    }
                    let choice = answer.expect("a worker");
                    let seen: Vec<_> = choice.seen.candidates.iter()
                        .map(|c| (c.new_tokens.0, c.queued.0, c.batch_size)).collect();
                    prop_assert_eq!(seen, naive.seen(&ids));
                    prop_assert_eq!(choice.seen.turn, naive.turn);
                    prop_assert_eq!(choose(&Product, choice.seen.view(), &mut Vec::new()), Some(choice.at));
                    prop_assert_eq!(choice.id.is_some(), commit);
                    if let Some(id) = choice.id {
                        let worker = NAMES.into_iter().find(|name| *name == choice.worker()).expect("one of them");
                        let new_tokens = choice.chosen().new_tokens.0;
                        naive.flights.push(NaiveFlight { id, worker, ids, new_tokens, prefilled: false });
                        naive.turn += 1;
                    }
                }
                Op::Fail { conversation, len, scored } => {
                    let mut left = scored;
                    let prompts = (0..=scored).map(|more| prompt(&ids(conversation, len + more))).collect();
                    let answer = router.route_many::<RouterError>(prompts, true, &mut |seen| {
                        left = left.checked_sub(1).ok_or(RouterError::EmptyPrompt)?;
                        Ok(vec![0; seen.candidates.len()])
                    });
                    prop_assert!(answer.is_err(), "and nothing has changed, as `check` sees");
                }
                Op::Prefilled(at) => if let Some(flight) = naive.flights.get_mut(at) {
                    prop_assert_eq!(router.prefilled(flight.id), !flight.prefilled);
                    if !flight.prefilled {
                        flight.prefilled = true;
                        let (worker, chain) = (flight.worker, hashes(&flight.ids));
                        naive.worker(worker).expect("of a flight").used(&chain);
                    }
                },
                Op::Finished(at, output) => if at < naive.flights.len() {
                    let flight = naive.flights.swap_remove(at);
                    let output: Vec<u32> = (0..output as u32).map(|i| 900 + i).collect();
                    prop_assert!(router.finished(flight.id, &output));
                    prop_assert!(!router.finished(flight.id, &output), "it ended");
                    let mut known = flight.ids;
                    known.extend(&output[..output.len().saturating_sub(1)]);
                    naive.worker(flight.worker).expect("of a flight").used(&hashes(&known));
                },
                Op::TakeBack(at) => if at < naive.flights.len() {
                    prop_assert!(router.take_back(naive.flights.swap_remove(at).id));
                },
                Op::Report { worker, conversation, len, stored, cleared } => {
                    let chain = hashes(&ids(conversation, len));
                    let (there, gone): (&[_], &[_]) = if stored { (&chain, &[]) } else { (&[], &chain) };
                    let answer = router.report(NAMES[worker], cleared, gone, there);
                    match naive.worker(NAMES[worker]) {
                        Some(own) if own.capacity.is_none() => {
                            prop_assert_eq!(answer, Ok(()));
                            if cleared { own.stored.clear(); }
                            own.stored.retain(|block| !gone.contains(block));
                            own.stored.extend(there.iter().copied());
                            own.stored.sort_unstable();
                            own.stored.dedup();
                        }
                        _ => prop_assert!(answer.is_err()),
                    }
                }
            }
            check(&router, &naive)?;
        }
        for flight in std::mem::take(&mut naive.flights) {
            prop_assert!(router.take_back(flight.id));
        }
        check(&router, &naive)?;
        prop_assert!(router.workers().all(|state| state.batch_size == 0 && state.queued == Tokens::ZERO));
    }
}

#[test]
fn a_follow_up_hits_before_the_first_prefill_ends_and_after_its_answer() {
    let mut router = Router::new(size());
    router.add_worker("a", Some(Blocks(100))).expect("a new name");
    let ids = ids(0, 40);
    let new = |router: &mut Router, ids: &[u32]| {
        router.route(prompt(ids), &Product, false).expect("a worker").chosen().new_tokens.0
    };
    let first = router.route(prompt(&ids[..20]), &Product, true).expect("a worker");
    assert_eq!(new(&mut router, &ids), 20, "committed: 20 of 40 are on their way");
    router.finished(first.id.expect("committed"), &ids[20..33]);
    assert_eq!(new(&mut router, &ids), 8, "20 and 13 known, of which the last is not computed: 8 blocks");
}

#[test]
fn what_never_ran_is_not_predicted() {
    let mut router = Router::new(size());
    router.add_worker("a", Some(Blocks(100))).expect("a new name");
    let choice = router.route(prompt(&ids(0, 20)), &Product, true).expect("a worker");
    router.take_back(choice.id.expect("committed"));
    assert_eq!(router.workers().next().expect("a").indexed, Blocks::ZERO);
}

#[test]
fn refusals_say_what_was_wrong() {
    let mut router = Router::new(size());
    router.add_worker("a", Some(Blocks(1))).expect("a new name");
    assert_eq!(router.add_worker("a", None), Err(RouterError::WorkerExists("a".into())));
    assert_eq!(router.remove_worker("b"), Err(RouterError::UnknownWorker("b".into())));
    assert_eq!(router.report("a", true, &[], &[]), Err(RouterError::Predicted("a".into())));
    assert_eq!(router.route(prompt(&[]), &Product, true), Err(RouterError::EmptyPrompt));
    let scores = router.route_by::<RouterError>(prompt(&[1]), true, &mut |_| Ok(vec![1, 2]));
    assert_eq!(scores, Err(RouterError::Scores { got: 2, want: 1 }));
    assert_eq!(router.workers().next().expect("a").batch_size, 0);
}

#[test]
fn named_policies_take_turns_over_all_workers() {
    for policy in PolicyName::ALL {
        let mut router = Router::new(size());
        for name in NAMES {
            router.add_worker(name, None).expect("a new name");
        }
        let choices: Vec<_> = (0..40)
            .map(|i| router.route(prompt(&ids(i, 5)), &*policy.policy(3), true).expect("a worker").worker().to_owned())
            .collect();
        assert!(NAMES.iter().all(|name| choices.iter().any(|worker| worker == name)), "{policy}: {choices:?}");
    }
}

#[test]
fn arrivals_and_prefills_are_measured_by_the_time_that_is_told() {
    let mut router = Router::new(size());
    for name in ["a", "b"] {
        router.add_worker(name, None).expect("a new name");
    }
    let expected = |router: &mut Router| {
        let seen = router.route(prompt(&[1]), &Product, false).expect("a worker").seen;
        (seen.anticipation.arrivals_a_second(), seen.anticipation.seconds_a_token())
    };
    assert_eq!(expected(&mut router).0.to_bits(), 0f64.to_bits(), "nobody came yet, and questions are no arrivals");
    // ten a second, each computed within 20 ms, a token in one: 5 a second at each worker
    for at in 1..=1000u64 {
        router.advance(Micros(at * 100_000));
        let choice = router.route(prompt(&ids(at as u32 * 2, 20)), &Product, true).expect("a worker");
        let id = choice.id.expect("committed");
        router.advance(Micros(at * 100_000 + 12_000));
        assert!(router.left(id, Tokens(8)), "12 of 20");
        router.advance(Micros(at * 100_000 + 20_000));
        assert!(router.prefilled(id) && router.finished(id, &[]));
    }
    let (arrivals, a_token) = expected(&mut router);
    assert!((arrivals - 5.0).abs() < 0.05 && (a_token / 1e-3 - 1.0).abs() < 0.03, "{arrivals} {a_token}");
    // of two that a worker has at once the second begins when the first has ended
    router.remove_worker("b").expect("there");
    for at in 0..1000u64 {
        let began = 200_000_000 + at * 100_000;
        router.advance(Micros(began));
        let both = [1, 2].map(|of| prompt(&ids(at as u32 * 4 + of, 20)));
        let both = both.map(|prompt| router.route(prompt, &Product, true).expect("a worker").id.expect("committed"));
        for (id, end) in both.into_iter().zip([40_000, 80_000]) {
            router.advance(Micros(began + end));
            assert!(router.prefilled(id) && router.finished(id, &[]));
        }
        router.advance(Micros(7));
    }
    let (arrivals, a_token) = expected(&mut router);
    assert!((arrivals - 20.0).abs() < 0.2 && (a_token / 2e-3 - 1.0).abs() < 0.03, "{arrivals} {a_token}");
}
