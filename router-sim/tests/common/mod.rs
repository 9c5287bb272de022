//! What the tests of the scheduler in virtual time have in common.
#![allow(dead_code, reason = "each test uses a part")]

use std::sync::Arc;

use router_core::{
    BlockHash, BlockSize, Blocks, Config, Epoch, Layout, Micros, Mode, ModelSpec, NewRequest, PolicyName, RequestId,
    Tokens, WorkerSpec,
};
use router_sim::{Outcome, Simulation, next_token};

pub const FOREVER: Micros = Micros(u64::MAX / 4);
pub const VOCAB: u32 = 1000;

pub fn model() -> ModelSpec {
    let block_size = BlockSize::new(16).expect("not zero");
    ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size, vocab: VOCAB }
}

pub fn spec(blocks: u64, max_rows: u32) -> WorkerSpec {
    let name = "w".into();
    WorkerSpec {
        name,
        epoch: Epoch(1),
        model: model(),
        blocks: Blocks(blocks),
        max_rows,
        max_context: Tokens(8192),
        chunk: Tokens(512),
        layout: Layout::Paged,
        cost: None,
    }
}

pub fn config(policy: PolicyName, slice_len: u32) -> Config {
    Config { policy, mode: Mode::Slice, slice_len: Some(slice_len), seed: 7, max_rows: 10_000 }
}

pub fn request(id: u64, prompt: Vec<u32>, max_tokens: u64) -> NewRequest {
    let prompt: Arc<[u32]> = prompt.into();
    NewRequest {
        id: RequestId(id),
        prompt,
        root: BlockHash(1),
        choices: 1,
        max_tokens: Tokens(max_tokens),
        urgent: false,
    }
}

pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len)
        .scan(seed % VOCAB, |id, at| {
            *id = next_token(*id, at, VOCAB);
            Some(*id)
        })
        .collect()
}

/// What the modelled worker draws after a prompt, computed here.
pub fn answer(prompt: &[u32], n: u64) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..n {
        all.push(next_token(all[all.len() - 1], all.len() - 1, VOCAB));
    }
    all.split_off(prompt.len())
}

/// After everything: each row ended once with its tokens, and nothing is left on any worker.
pub fn check_drained(sim: &Simulation, out: &Outcome) {
    for (row, outcome) in &out.rows {
        assert_eq!(outcome.ends.len(), 1, "{row} ended {} times", outcome.ends.len());
    }
    for load in sim.loads() {
        let numbers = (load.queued, load.batch_size, load.work, load.running_rows, load.held_rows);
        assert_eq!(numbers, (Tokens(0), 0, Micros(0), 0, 0), "{}", load.worker);
        assert_eq!((load.running_blocks, load.held_blocks), (Blocks(0), Blocks(0)), "{}", load.worker);
        let own = sim.worker_load(load.worker).expect("present");
        assert_eq!([own[0], own[1], own[3], own[4]], [0; 4], "{} itself", load.worker);
        assert_eq!(own[5], load.indexed.0, "the index is what {} has", load.worker);
    }
    assert_eq!(out.quarantined, Vec::<String>::new());
    assert_eq!(out.refused, Vec::<String>::new());
}
