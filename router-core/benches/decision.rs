//! What a decision costs at 64 workers, beside what it cannot be cheaper than in the same run: hashing beside one xxh3
//! pass over the same bytes, the look-up beside one map probe for each block, and the naive index.

use std::sync::Arc;

use divan::{Bencher, black_box};
use hashbrown::HashSet;
use router_core::{
    Action, BlockHash, BlockSize, BlockTrie, Blocks, Config, Epoch, Event, Guarding, Layout, Micros, Mode, ModelSpec,
    NaiveIndex, NewRequest, PolicyName, PrefixIndex, Product, Prompt, RequestId, Router, Scheduler, Tokens, WorkerId,
    WorkerMessage, WorkerSpec, hash_blocks,
};

const WORKERS: u32 = 64;
const LENGTHS: [usize; 3] = [256, 2048, 16384];

fn main() {
    divan::main();
}

fn size() -> BlockSize {
    BlockSize::new(16).expect("not zero")
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| i.wrapping_mul(2_654_435_761) % 32_000).collect()
}

/// Worker `w` holds the first `w / 64` of the chain: every depth of a look-up is somewhere.
fn filled(index: &mut dyn PrefixIndex, chain: &[BlockHash]) {
    for worker in 0..WORKERS {
        let depth = chain.len() * (worker as usize + 1) / WORKERS as usize;
        chain[..depth].iter().for_each(|block| index.store(WorkerId(worker), *block));
    }
}

#[divan::bench(args = LENGTHS)]
fn hash(bencher: Bencher, len: usize) {
    let ids = prompt(len);
    bencher.bench(|| hash_blocks(BlockHash(1), black_box(&ids), size()));
}

#[divan::bench(args = LENGTHS)]
fn hash_limit_one_pass(bencher: Bencher, len: usize) {
    let bytes: Vec<u8> = prompt(len).iter().flat_map(|id| id.to_le_bytes()).collect();
    bencher.bench(|| xxhash_rust::xxh3::xxh3_64(black_box(&bytes)));
}

#[divan::bench(args = LENGTHS)]
fn look_up_trie(bencher: Bencher, len: usize) {
    let chain = hash_blocks(BlockHash(1), &prompt(len), size());
    let mut index = BlockTrie::default();
    filled(&mut index, &chain);
    let mut depths = Vec::new();
    bencher.bench_local(|| index.matched(black_box(&chain), &mut depths));
}

#[divan::bench(args = LENGTHS)]
fn look_up_naive(bencher: Bencher, len: usize) {
    let chain = hash_blocks(BlockHash(1), &prompt(len), size());
    let mut index = NaiveIndex::default();
    filled(&mut index, &chain);
    let mut depths = Vec::new();
    bencher.bench_local(|| index.matched(black_box(&chain), &mut depths));
}

#[divan::bench(args = LENGTHS)]
fn look_up_limit_one_probe_a_block(bencher: Bencher, len: usize) {
    let chain = hash_blocks(BlockHash(1), &prompt(len), size());
    let set: HashSet<BlockHash> = chain.iter().copied().collect();
    bencher.bench(|| black_box(&chain).iter().filter(|block| set.contains(*block)).count());
}

/// A request's way through the index: its blocks are committed on a worker that holds half of them, and taken back.
#[divan::bench(args = LENGTHS)]
fn commit_and_take_back(bencher: Bencher, len: usize) {
    let chain = hash_blocks(BlockHash(1), &prompt(len), size());
    let mut index = BlockTrie::default();
    filled(&mut index, &chain[..chain.len() / 2]);
    let worker = WorkerId(WORKERS - 1);
    bencher.bench_local(|| {
        index.commit(worker, black_box(&chain));
        index.take_back(worker, black_box(&chain));
    });
}

/// What an embedded router does for a hashed prompt: decide among 64 workers, count it there, and take that back.
/// Each prompt goes on from the middle of another of the sessions that the workers hold, a quarter of a million blocks.
#[divan::bench(args = LENGTHS, sample_count = 2000, sample_size = 1)]
fn embedded_decision(bencher: Bencher, len: usize) {
    decides(bencher, len, Guarding::Off);
}

/// The same with the hotspot guard.
#[divan::bench(args = LENGTHS, sample_count = 2000, sample_size = 1)]
fn embedded_decision_guarded(bencher: Bencher, len: usize) {
    decides(bencher, len, Guarding::Filter);
}

fn decides(bencher: Bencher, len: usize, guard: Guarding) {
    let sessions = (1 << 22) / len as u32;
    let ids = |session: u32, turn: u32| {
        let ids = prompt(len).into_iter().enumerate();
        ids.map(move |(at, id)| id ^ session ^ if at < len / 2 { 0 } else { turn }).collect::<Vec<u32>>()
    };
    let mut router = Router::new(size()).with_guard(guard);
    for w in 0..WORKERS {
        router.add_worker(&w.to_string(), None).expect("a new name");
    }
    for session in 0..sessions {
        let chain = hash_blocks(BlockHash(1), &ids(session, 0), size());
        router.report(&(session % WORKERS).to_string(), false, &[], &chain).expect("a worker");
    }
    let prompts = (0..sessions.min(1000)).map(|at| Prompt::new(BlockHash(1), &ids(at * 7 % sessions, 1 << 20), size()));
    let prompts: Vec<Prompt> = prompts.collect();
    let mut next = prompts.iter().cycle();
    bencher.bench_local(|| {
        let choice = router.route(next.next().expect("endless").clone(), &Product, true).expect("a decision");
        choice.id.map(|id| router.finished(id, &[]))
    });
}

/// Tokens to decision: hash, look-up, score, for 64 workers that are all ready.
#[divan::bench(args = LENGTHS)]
fn tokens_to_decision(bencher: Bencher, len: usize) {
    let model = ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size: size(), vocab: 32_000 };
    let config =
        Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: Some(32), seed: 0, max_rows: 4096 };
    let mut scheduler = Scheduler::new(model.clone(), config);
    let ids = prompt(len);
    let chain = hash_blocks(BlockHash(1), &ids, size());
    let mut actions = Vec::new();
    for w in 0..WORKERS {
        let worker = WorkerId(w);
        let spec = WorkerSpec {
            name: format!("w{w}"),
            epoch: Epoch(1),
            model: model.clone(),
            blocks: Blocks(100_000),
            max_rows: 64,
            max_context: Tokens(100_000),
            chunk: Tokens(512),
            layout: Layout::Paged,
            cost: None,
        };
        scheduler.handle(Micros(0), Event::WorkerJoined { worker, spec }, &mut actions);
        let hashes = chain[..chain.len() * (w as usize + 1) / WORKERS as usize].to_vec();
        let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes };
        scheduler.handle(Micros(0), Event::Worker { worker, epoch: Epoch(1), seq: 1, message }, &mut actions);
    }
    let request = NewRequest {
        id: RequestId(1),
        prompt: Arc::from(&ids[..]),
        root: BlockHash(1),
        choices: 1,
        max_tokens: Tokens(10),
        urgent: false,
    };
    scheduler.handle(Micros(0), Event::RequestArrived(request), &mut actions);
    assert!(actions.iter().any(|action| matches!(action, Action::Plan(..))));
    bencher.bench_local(|| scheduler.route(Micros(1), black_box(&ids), BlockHash(1)));
}
