//! What a decision costs at 64 workers, beside what it cannot be cheaper than in the same run: hashing beside one xxh3
//! pass over the same bytes, the look-up beside one map probe for each block, and the naive index.

use std::sync::Arc;

use divan::{Bencher, black_box};
use hashbrown::HashSet;
use router_core::{
    Action, BlockHash, BlockSize, BlockTrie, Blocks, Config, Epoch, Event, Micros, ModelSpec, NaiveIndex, NewRequest,
    PolicyName, PrefixIndex, RequestId, Scheduler, Tokens, WorkerId, WorkerMessage, WorkerSpec, hash_blocks,
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

/// Tokens to decision: hash, look-up, score, for 64 workers that are all ready.
#[divan::bench(args = LENGTHS)]
fn tokens_to_decision(bencher: Bencher, len: usize) {
    let model = ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size: size(), vocab: 32_000 };
    let config = Config { policy: PolicyName::Product, slice_len: 32, seed: 0, max_rows: 4096 };
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
    };
    scheduler.handle(Micros(0), Event::RequestArrived(request), &mut actions);
    assert!(actions.iter().any(|action| matches!(action, Action::Plan(..))));
    bencher.bench_local(|| scheduler.route(Micros(1), black_box(&ids), BlockHash(1)));
}
