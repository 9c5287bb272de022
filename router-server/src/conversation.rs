//! What of conversations is tokenised already, so that a later turn costs only what is new in it.
//!
//! A text is cut into pieces (see [`Boundaries`](crate::boundaries::Boundaries)); each is known by the hash of all text
//! up to its end, which chains like block hashes do. What tokenising gave is remembered, and what the model generated:
//! a text may be spelled by many ids, and those of an answer are to stay the ones whose KV a worker holds.
//! Knows texts and ids; does not know requests, templates or threads.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashMap;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::random::random;
use crate::tokenizer::{Split, Tokenizer, TokenizerError};

/// Most bytes that the pieces of a model take: some 2,000 conversations of 16k tokens.
const MOST_BYTES: usize = 256 << 20;
/// What a piece takes beside its text and ids, about: its places in map and queue, its allocations.
const OVERHEAD: usize = 160;
/// A piece with a larger part of all bytes than this is not kept: it would put out too many others.
const LARGEST_PART: usize = 8;
/// Pieces looked up or put in under one lock.
const AT_ONCE: usize = 256;
/// Most pieces that one that comes passes over because they were used; then the oldest goes, used or not.
const SPARED: usize = 64;

/// A part of a text and its ids.
#[derive(Debug)]
struct Piece {
    text: Box<str>,
    ids: Box<[u32]>,
}

impl Piece {
    fn bytes(&self) -> usize {
        self.text.len() + size_of_val(&*self.ids) + OVERHEAD
    }
}

/// The tokenised pieces of one model's conversations; bounded, the ones not used for long go first.
pub struct Conversations {
    /// Hash of the empty text. Nobody outside knows it, so nobody can aim at another's hashes.
    root: u64,
    most_bytes: usize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    pieces: HashMap<u64, Place>,
    /// In the order in which they came or were spared.
    queue: VecDeque<u64>,
    bytes: usize,
}

struct Place {
    piece: Arc<Piece>,
    used: bool,
}

impl Default for Conversations {
    fn default() -> Self {
        Self::new(MOST_BYTES)
    }
}

impl Conversations {
    /// Keeps at most so many bytes.
    pub fn new(most_bytes: usize) -> Self {
        Self { root: random(), most_bytes, known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Nothing under it panics half-way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ids of a text without special tokens added, and where an answer to it will stand. Takes as long as tokenising
    /// what is not known.
    pub fn encode(
        self: &Arc<Self>,
        tokenizer: &Arc<Tokenizer>,
        split: &Split,
        text: &str,
    ) -> Result<(Vec<u32>, Option<Turn>), TokenizerError> {
        let mut before = self.root;
        let mut hash = self.root;
        let pieces = split.boundaries.pieces(text).map(|piece| {
            before = hash;
            hash = chain(before, piece);
            (hash, piece)
        });
        let pieces: Vec<(u64, &str)> = pieces.collect();
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut last = None;
        for some in pieces.chunks(AT_ONCE) {
            let known: Vec<Option<Arc<Piece>>> = {
                let mut known = self.lock();
                some.iter().map(|(hash, _)| known.get(*hash)).collect()
            };
            let mut new = Vec::new();
            for ((hash, text), known) in some.iter().zip(known) {
                // The text is compared: ids do not depend on how good a hash is.
                let piece = if let Some(piece) = known.filter(|piece| *piece.text == **text) {
                    piece
                } else {
                    let ids = tokenizer.encode(text, false)?.into();
                    let piece = Arc::new(Piece { text: (*text).into(), ids });
                    new.push((*hash, Arc::clone(&piece)));
                    piece
                };
                ids.extend_from_slice(&piece.ids);
                last = Some(piece);
            }
            self.put(new);
        }
        let turn = last.map(|last| Turn {
            conversations: Arc::clone(self),
            tokenizer: Arc::clone(tokenizer),
            before,
            last,
            answer: Vec::new(),
        });
        Ok((ids, turn))
    }

    fn put(&self, new: Vec<(u64, Arc<Piece>)>) {
        if new.is_empty() {
            return;
        }
        let mut known = self.lock();
        for (hash, piece) in new {
            if piece.bytes() <= self.most_bytes / LARGEST_PART {
                known.put(hash, piece, self.most_bytes);
            }
        }
    }
}

fn chain(before: u64, piece: &str) -> u64 {
    xxh3_64_with_seed(piece.as_bytes(), before)
}

impl Known {
    fn get(&mut self, hash: u64) -> Option<Arc<Piece>> {
        let place = self.pieces.get_mut(&hash)?;
        place.used = true;
        Some(Arc::clone(&place.piece))
    }

    fn put(&mut self, hash: u64, piece: Arc<Piece>, most_bytes: usize) {
        self.bytes += piece.bytes();
        match self.pieces.insert(hash, Place { piece, used: false }) {
            Some(replaced) => self.bytes -= replaced.piece.bytes(),
            None => self.queue.push_back(hash),
        }
        let mut spared = 0;
        while self.bytes > most_bytes
            && let Some(oldest) = self.queue.pop_front()
        {
            match self.pieces.get_mut(&oldest) {
                Some(place) if place.used && spared < SPARED => {
                    place.used = false;
                    spared += 1;
                    self.queue.push_back(oldest);
                }
                _ => {
                    let gone = self.pieces.remove(&oldest);
                    self.bytes -= gone.map_or(0, |place| place.piece.bytes());
                }
            }
        }
    }
}

/// Where the answer to a conversation stands, and the answer as it comes.
#[derive(Clone)]
pub struct Turn {
    conversations: Arc<Conversations>,
    tokenizer: Arc<Tokenizer>,
    /// Hash of the text before its last piece, which the answer goes on with.
    before: u64,
    last: Arc<Piece>,
    answer: Vec<u32>,
}

impl Turn {
    /// The next ids of the answer.
    pub fn push(&mut self, ids: &[u32]) {
        self.answer.extend_from_slice(ids);
    }

    /// The answer has ended: when its text comes back as a part of the conversation, it has the ids that were generated.
    /// Takes as long as tokenising it.
    ///
    /// A token without a text that ended it is left to the template, which puts it there. What is learned is for all who
    /// send this text after that conversation, so it must say no more and no less than the text does: where text alone
    /// does not tell what was generated, nothing is learned. That is so if there is a token without a text inside; if
    /// bytes were no character, because their sign is a character itself; and if letters spell an added token, because
    /// what was said would become a border between messages, or the other way round.
    pub fn learn(self) {
        let tokenizer = &self.tokenizer;
        let answer = match &self.answer[..] {
            [rest @ .., last] if tokenizer.silent(*last) => rest,
            all => all,
        };
        if answer.is_empty() || answer.iter().any(|id| tokenizer.silent(*id)) {
            return;
        }
        // As it reads after the ids before it: alone, some tokens lose their leading space.
        let ids = [&self.last.ids, answer].concat();
        let read = tokenizer.decode(&ids);
        let Some(text) = read.strip_prefix(&tokenizer.decode(&self.last.ids)) else { return };
        if text.contains(char::REPLACEMENT_CHARACTER) {
            return;
        }
        let text = [&self.last.text, text].concat();
        let added = |ids: &[u32]| ids.iter().copied().filter(|id| tokenizer.is_added(*id)).collect::<Vec<u32>>();
        if !tokenizer.encode(&text, false).is_ok_and(|own| added(&own) == added(&ids)) {
            return;
        }
        let hash = chain(self.before, &text);
        self.conversations.put(vec![(hash, Arc::new(Piece { text: text.into(), ids: ids.into() }))]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(bytes: usize) -> Arc<Piece> {
        Arc::new(Piece { text: "x".repeat(bytes - OVERHEAD - 4).into(), ids: Box::new([1]) })
    }

    #[test]
    fn what_is_used_stays_and_the_bound_holds() {
        let conversations = Conversations::new(100 * 1000);
        conversations.put(vec![(0, piece(1000))]);
        for hash in 1..1000 {
            conversations.put(vec![(hash, piece(1000))]);
            let mut known = conversations.lock();
            assert!(known.get(0).is_some(), "used before every other came: {hash}");
            assert!(known.bytes <= 100 * 1000 && known.pieces.len() == known.queue.len());
        }
        let mut known = conversations.lock();
        assert_eq!((known.bytes, known.pieces.len()), (100 * 1000, 100));
        assert!(known.get(900).is_none() && known.get(999).is_some());
    }

    #[test]
    fn a_piece_is_replaced_in_its_place() {
        let conversations = Conversations::new(100 * 1000);
        conversations.put(vec![(7, piece(1000)), (7, piece(3000)), (7, piece(2000))]);
        let known = conversations.lock();
        assert_eq!((known.bytes, known.pieces.len(), known.queue.len()), (2000, 1, 1));
    }

    #[test]
    fn one_piece_does_not_put_out_all_others() {
        let conversations = Conversations::new(100 * 1000);
        conversations.put(vec![(1, piece(1000)), (2, piece(50 * 1000))]);
        let mut known = conversations.lock();
        assert!(known.get(1).is_some() && known.get(2).is_none());
    }

    #[test]
    fn when_all_are_used_one_goes_all_the_same() {
        let conversations = Conversations::new(1000 * 1000);
        conversations.put((0..1000).map(|hash| (hash, piece(1000))).collect());
        (0..1000).for_each(|hash| assert!(conversations.lock().get(hash).is_some()));
        conversations.put(vec![(1000, piece(1000))]);
        assert!(conversations.lock().get(1000).is_some(), "what came last is kept");
        assert_eq!(conversations.lock().pieces.len(), 1000);
    }
}
