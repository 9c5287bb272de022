//! A row as a modelled worker has it: its tokens, and what ends it.
//!
//! Its tokens are a function of the token before and its place, so every run of a row can be checked against any other.

use router_core::{FinishReason, RowKey, RowReport, RowStart, RowTokens, TokenLogprobs, Tokens, WorkerSpec};

use crate::random::mix;

/// The token after `previous`, which stands at `position` of prompt and output. Never below 3, so never an eos.
pub fn next_token(previous: u32, position: usize, vocab: u32) -> u32 {
    let x = ((u64::from(previous) << 32) | position as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
    3 + (mix(x) % u64::from(vocab.max(4) - 3)) as u32
}

/// The token that rows draw whose tokens are only counted.
const COUNTED: u32 = 3;

/// What a row asks for beyond what the core knows of it.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Ids that end it, from index `min_tokens` on.
    pub stop_ids: Vec<u32>,
    /// Tokens it draws at least.
    pub min_tokens: u32,
    /// Logprobs of its tokens, with so many of the most likely ids.
    pub logprobs: Option<u32>,
    /// It ends by itself after so many tokens, whatever they are.
    pub length: Option<u32>,
}

impl Terms {
    /// A row of this prompt ends with its output token number `length`, unless a shorter limit ends it first: the token
    /// drawn there is made its eos.
    #[must_use]
    pub fn ending_at(prompt: &[u32], length: u32, vocab: u32) -> Self {
        let length = length.max(1);
        let Some(&last) = prompt.last() else { return Self::default() };
        let places = prompt.len() - 1..prompt.len() - 1 + length as usize;
        let eos = places.fold(last, |id, position| next_token(id, position, vocab));
        Self { stop_ids: vec![eos], min_tokens: length - 1, ..Self::default() }
    }
}

pub(crate) struct Sequence {
    pub(crate) key: RowKey,
    /// None where nobody reads them.
    pub(crate) tokens: Vec<u32>,
    len: usize,
    pub(crate) prompt: usize,
    pub(crate) max_tokens: usize,
    terms: Terms,
}

impl Sequence {
    pub(crate) fn new(start: &RowStart, terms: Terms) -> Self {
        Self { tokens: [&start.prompt, &start.output[..]].concat(), ..Self::counted(start, terms) }
    }

    /// Its tokens are only counted: all it draws are alike.
    pub(crate) fn counted(start: &RowStart, terms: Terms) -> Self {
        Self {
            key: start.key,
            tokens: Vec::new(),
            len: start.prompt.len() + start.output.len(),
            prompt: start.prompt.len(),
            max_tokens: start.max_tokens.0 as usize,
            terms,
        }
    }

    /// Prompt and output so far.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn output(&self) -> usize {
        self.len - self.prompt
    }

    /// Prompt and output at its limit.
    pub(crate) fn total(&self) -> usize {
        self.prompt + self.max_tokens
    }

    /// Draws a token and says whether it was the last.
    pub(crate) fn draw(&mut self, vocab: u32, cached: Option<Tokens>) -> RowTokens {
        let first_index = self.output() as u32;
        let mut id = COUNTED;
        if let Some(last) = self.tokens.last() {
            id = next_token(*last, self.len - 1, vocab);
            self.tokens.push(id);
        }
        self.len += 1;
        let stops = self.terms.length.is_some_and(|length| first_index + 1 >= length)
            || self.terms.stop_ids.contains(&id) && first_index >= self.terms.min_tokens;
        let finish = if stops {
            Some(FinishReason::Stop)
        } else {
            (self.output() >= self.max_tokens).then_some(FinishReason::Length)
        };
        let logprobs = self.terms.logprobs.iter().map(|top| made_up_logprobs(id, *top, vocab)).collect();
        RowTokens { key: self.key, first_index, ids: vec![id], logprobs, finish, cached }
    }
}

/// There is no model, so likelihoods are made up: of rank r, from 0, is the id r above the drawn one, half as likely as
/// the one before it.
fn made_up_logprobs(id: u32, top: u32, vocab: u32) -> TokenLogprobs {
    let of_rank = |rank: u32| -(rank as f32 + 1.0) * std::f32::consts::LN_2;
    let id_of_rank = |rank: u32| (u64::from(id) + u64::from(rank)) % u64::from(vocab);
    let top = (0..top.min(vocab)).map(|rank| (id_of_rank(rank) as u32, of_rank(rank))).collect();
    TokenLogprobs { chosen: of_rank(0), top }
}

/// Whether a row can never run on this worker.
pub(crate) fn invalid(start: &RowStart, spec: &WorkerSpec) -> bool {
    let total = (start.prompt.len() as u64).saturating_add(start.max_tokens.0);
    start.prompt.is_empty()
        || start.max_tokens.0 <= start.output.len() as u64
        || total > spec.max_context.0
        || start.prompt.iter().chain(&start.output).any(|id| *id >= spec.model.vocab)
}

/// The report of a row before it did anything.
pub(crate) fn unreported(key: RowKey) -> RowReport {
    RowReport {
        key,
        computed: Tokens::ZERO,
        cached: Tokens::ZERO,
        emitted: Tokens::ZERO,
        finish: None,
        held: true,
        prefill_left: Tokens::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use router_core::{BlockHash, RequestId, RowId};

    #[test]
    fn a_row_ends_where_its_eos_was_put() {
        let key = RowKey { row: RowId { request: RequestId(1), choice: 0 }, attempt: 0 };
        for length in [1, 2, 57, 500] {
            let prompt: Arc<[u32]> = vec![5, 9, 11].into();
            let start = RowStart {
                key,
                slice_no: 0,
                root: BlockHash(1),
                prompt: prompt.clone(),
                output: Vec::new(),
                max_tokens: Tokens(400),
                hold_rank: 0,
                prefill_budget: Tokens::ZERO,
            };
            let mut sequence = Sequence::new(&start, Terms::ending_at(&prompt, length, 100));
            let finish = std::iter::repeat_with(|| sequence.draw(100, None).finish).flatten().next();
            let (at, why) = if length > 400 { (400, FinishReason::Length) } else { (length, FinishReason::Stop) };
            assert_eq!((sequence.output(), finish), (at as usize, Some(why)));
        }
    }
}
