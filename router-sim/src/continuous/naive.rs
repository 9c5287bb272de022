//! The same engine row by row and block by block: what the fast one is held to.

use std::collections::{BTreeMap, BTreeSet};

use router_core::{BlockHash, BlockSize, Iteration, Micros, Tokens};

use super::{Arrival, Ended, Said};
use crate::device::Device;
use crate::timing::{Clock, Host, Noise, Pace};

struct Row {
    request: u32,
    chain: Vec<BlockHash>,
    tokens: u64,
    computed: u64,
    drawn: u32,
    output: u32,
    decodes: bool,
    /// Its blocks: named or its own.
    blocks: Vec<Option<BlockHash>>,
    /// Tokens it computes in this iteration; 0: none.
    now: u64,
    ended: Ended,
    hit: Option<u32>,
    last: Option<Micros>,
}

pub(crate) struct Naive {
    size: u64,
    chunk: u64,
    max_rows: usize,
    clock: Clock,
    total: u64,
    private: u64,
    named: BTreeSet<BlockHash>,
    /// Named blocks in no prompt of the batch, by when the last such prompt left.
    idle: BTreeMap<u64, BlockHash>,
    time: u64,
    running: Vec<Row>,
    waiting: Vec<Row>,
    pub(crate) due: Option<Micros>,
    pub(crate) said: Vec<Said>,
    pub(crate) stored: Vec<BlockHash>,
    pub(crate) removed: Vec<BlockHash>,
    removing: Vec<BlockHash>,
}

impl Naive {
    pub(crate) fn new(device: &Device, size: BlockSize, noise: Noise) -> Self {
        let pace = Pace { start: Micros::ZERO, ..device.pace(Host::every(device.host)).with_noise(noise) };
        Self {
            size: size.get(),
            chunk: device.chunk.into(),
            max_rows: device.max_rows as usize,
            clock: Clock::new(pace),
            total: device.kv.0 / size.get(),
            private: 0,
            named: BTreeSet::new(),
            idle: BTreeMap::new(),
            time: 0,
            running: Vec::new(),
            waiting: Vec::new(),
            due: None,
            said: Vec::new(),
            stored: Vec::new(),
            removed: Vec::new(),
            removing: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, chain: &[BlockHash], arrival: Arrival, now: Micros) {
        self.waiting.push(Row {
            request: arrival.request,
            chain: chain.to_vec(),
            tokens: arrival.input.into(),
            computed: 0,
            drawn: 0,
            output: arrival.output,
            decodes: false,
            blocks: Vec::new(),
            now: 0,
            ended: Ended::default(),
            hit: None,
            last: None,
        });
        if self.due.is_none() {
            self.begin(now);
        }
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.running.iter().chain(&self.waiting).map(|row| row.tokens).sum()
    }

    pub(crate) fn used_and_cached(&self) -> (u64, u64) {
        let cached = self.idle.len() as u64;
        (self.private + self.named.len() as u64 - cached, cached)
    }

    pub(crate) fn wake(&mut self) {
        let Some(now) = self.due.take() else { return };
        self.said.clear();
        self.stored.clear();
        self.removed = std::mem::take(&mut self.removing);
        let mut prefilled = Vec::new();
        for row in &mut self.running {
            if row.now == 0 {
                continue;
            }
            let before = row.computed / self.size;
            row.computed += row.now;
            for at in before..row.computed / self.size {
                let Some(&name) = row.chain.get(at as usize) else { break };
                row.blocks[at as usize] = Some(name);
                self.private -= 1;
                if self.named.insert(name) {
                    self.stored.push(name);
                }
            }
            if row.computed < row.tokens {
                prefilled.push(Said::Left(row.request, (row.tokens - row.computed) as u32));
                continue;
            }
            if !std::mem::replace(&mut row.decodes, true) {
                prefilled.push(Said::Prefilled(row.request));
            }
            match row.last {
                None => row.ended.first = now,
                Some(last) => row.ended.gap = row.ended.gap.max((now.0 - last.0) as u32),
            }
            row.last = Some(now);
            row.drawn += 1;
            row.tokens += 1;
        }
        self.said.append(&mut prefilled);
        while let Some(at) = self.running.iter().position(|row| row.drawn == row.output) {
            let row = self.running.remove(at);
            let ended = Ended { hit: row.hit.unwrap_or(0), output: row.drawn, ..row.ended };
            self.said.push(Said::Ended(row.request, ended));
            self.release(&row);
        }
        self.begin(now);
    }

    /// The row is in no batch any more.
    fn release(&mut self, row: &Row) {
        self.private -= row.blocks.iter().filter(|block| block.is_none()).count() as u64;
        for &name in row.chain.iter().rev() {
            if self.named.contains(&name) && !self.running.iter().any(|other| other.chain.contains(&name)) {
                self.time += 1;
                self.idle.insert(self.time, name);
            }
        }
    }

    fn available(&self) -> u64 {
        self.total - self.private - self.named.len() as u64 + self.idle.len() as u64
    }

    fn take(&mut self, blocks: u64) {
        for _ in 0..blocks {
            if self.total == self.private + self.named.len() as u64 {
                let (_, name) = self.idle.pop_first().expect("available");
                self.named.remove(&name);
                self.removing.push(name);
            }
            self.private += 1;
        }
    }

    fn preempt(&mut self) {
        let mut row = self.running.pop().expect("a row");
        self.release(&row);
        row.blocks.clear();
        row.computed = 0;
        row.now = 0;
        row.decodes = false;
        row.ended.preempted += 1;
        self.waiting.insert(0, row);
    }

    fn begin(&mut self, now: Micros) {
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let row = &self.running[at];
            if row.decodes && row.blocks.len() as u64 * self.size == row.computed {
                while self.available() == 0 && self.running.len() > at {
                    self.preempt();
                    preempted = true;
                }
                if self.running.len() > at {
                    self.take(1);
                    self.running[at].blocks.push(None);
                }
            }
            at += 1;
        }
        let mut work = Iteration::default();
        let mut budget = self.chunk;
        for row in &mut self.running {
            row.now = 0;
            if row.decodes {
                row.now = 1;
                work.rows += 1;
                work.context += row.tokens;
                budget = budget.saturating_sub(1);
            }
        }
        for row in &mut self.running {
            if !row.decodes {
                row.now = (row.tokens - row.computed).min(budget);
                budget -= row.now;
                work.chunk(Tokens(row.now), Tokens(row.computed));
            }
        }
        let admit = !preempted || self.running.is_empty();
        while admit && budget > 0 && self.running.len() < self.max_rows && !self.waiting.is_empty() {
            let row = &self.waiting[0];
            let present = row.chain.iter().take_while(|name| self.named.contains(*name)).count() as u64;
            let hit = present.min((row.tokens - 1) / self.size);
            let idle = self.idle.values().filter(|name| row.chain.contains(name)).count() as u64;
            let need = row.tokens.div_ceil(self.size) - hit;
            if need > self.available() - idle {
                break;
            }
            let mut row = self.waiting.remove(0);
            self.idle.retain(|_, name| !row.chain.contains(name));
            self.take(need);
            row.blocks = row.chain.iter().take(hit as usize).map(|name| Some(*name)).collect();
            row.blocks.resize((hit + need) as usize, None);
            row.computed = hit * self.size;
            row.hit.get_or_insert(row.computed as u32);
            row.now = (row.tokens - row.computed).min(budget);
            budget -= row.now;
            work.chunk(Tokens(row.now), Tokens(row.computed));
            self.running.push(row);
        }
        if !self.running.is_empty() {
            self.due = Some(now + self.clock.iteration(&work).max(Micros(1)));
        }
    }
}
