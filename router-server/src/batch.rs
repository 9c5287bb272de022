//! The generations of one request: one a prompt. Their pieces come as they come, their choices are counted through.

use std::pin::Pin;
use std::sync::Arc;

use futures::stream::{SelectAll, Stream, StreamExt};

use crate::error::Error;
use crate::eta::Eta;
use crate::generation::{End, Generation, Piece};

type Pieces = Pin<Box<dyn Stream<Item = Result<Piece, Error>> + Send>>;

/// What a request runs. Dropping it before its end cancels all of it.
pub enum Batch {
    /// One prompt.
    One(Box<Generation>),
    /// More than one.
    Several(Several),
}

/// Generations side by side.
pub struct Several {
    pieces: SelectAll<Pieces>,
    left: usize,
    /// Summed up over those that have ended.
    end: End,
    etas: Vec<Option<Eta>>,
}

impl Batch {
    /// Generations in the order of their prompts, each with `n` choices.
    pub fn new(mut generations: Vec<Generation>, n: u32) -> Self {
        if let [_] = generations[..] {
            return Self::One(Box::new(generations.remove(0)));
        }
        let left = generations.len();
        let pieces = (0..).zip(generations).map(|(prompt, generation)| pieces(generation, prompt * n)).collect();
        Self::Several(Several { pieces, left, end: End::default(), etas: Vec::new() })
    }

    /// The next piece; after one with an end, or an error, there is no other.
    pub async fn next(&mut self) -> Result<Piece, Error> {
        match self {
            Self::One(generation) => generation.next().await,
            Self::Several(several) => several.next().await,
        }
    }

    /// The worker that has it, once one has; several have several.
    pub fn worker(&self) -> Option<&Arc<str>> {
        match self {
            Self::One(generation) => generation.worker(),
            Self::Several(_) => None,
        }
    }

    /// What was foreseen of it before its first token; of several it is known at the end.
    pub fn eta(&self) -> Option<Eta> {
        match self {
            Self::One(generation) => generation.eta(),
            Self::Several(_) => None,
        }
    }
}

/// All that a generation gives, its choices counted from `first`.
fn pieces(mut generation: Generation, first: u32) -> Pieces {
    Box::pin(async_stream::stream! {
        loop {
            let piece = generation.next().await.map(|piece| Piece { choice: first + piece.choice, ..piece });
            let last = piece.as_ref().map_or(true, |piece| piece.end.is_some());
            yield piece;
            if last {
                break;
            }
        }
    })
}

impl Several {
    async fn next(&mut self) -> Result<Piece, Error> {
        let next = self.pieces.next().await;
        let mut piece = next.unwrap_or_else(|| Err(Error::Internal("nothing is left to generate".into())))?;
        if let Some(end) = piece.end.take() {
            self.left -= 1;
            let sum = &mut self.end;
            sum.prompt_tokens += end.prompt_tokens;
            sum.completion_tokens += end.completion_tokens;
            sum.cached_tokens += end.cached_tokens;
            sum.slices = sum.slices.max(end.slices);
            sum.ttft = sum.ttft.into_iter().chain(end.ttft).min();
            self.etas.push(end.eta);
            if self.left == 0 {
                sum.eta = Eta::all(self.etas.drain(..));
                piece.end = Some(sum.clone());
            }
        }
        Ok(piece)
    }
}
