//! One output from its ids to the text and the tokens that a client gets.
//!
//! Text waits where it may be a part of a character or of a stop string; a token waits with the text that it begins. So
//! whatever is given out, the tokens given are those of the text given, and what a stop string cuts off never shows.

use std::collections::VecDeque;

use router_core::TokenLogprobs;

use crate::stop::StopMatcher;
use crate::tokenizer::Detokenizer;

/// A token that is given out.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Characters of the output's text before it.
    pub offset: usize,
    /// If they were asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// What is given out at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Given {
    /// Text that is decided.
    pub text: String,
    /// Tokens whose text begins in it or before, or that have none.
    pub tokens: Vec<Token>,
}

/// An output as it grows.
pub struct Output {
    /// Without a tokenizer there is no text, and no token waits.
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    /// Tokens in which no stop string is looked for.
    min_tokens: u32,
    drawn: u32,
    /// Bytes of text decoded so far, characters of it, and bytes given out.
    decoded: usize,
    characters: usize,
    given: usize,
    /// Tokens not given out, each with the byte at which its text begins.
    waiting: VecDeque<(usize, Token)>,
    stopped: bool,
}

impl Output {
    /// At its beginning.
    pub fn new(detokenizer: Option<Detokenizer>, stops: StopMatcher, min_tokens: u32) -> Self {
        Self {
            detokenizer,
            stops,
            min_tokens,
            drawn: 0,
            decoded: 0,
            characters: 0,
            given: 0,
            waiting: VecDeque::new(),
            stopped: false,
        }
    }

    /// Tokens drawn, given out or not.
    pub fn drawn(&self) -> u32 {
        self.drawn
    }

    /// Whether a stop string has matched: nothing more is given out.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Takes the next token and gives out what it decides. After a match it is not to be called.
    pub fn push(&mut self, id: u32, logprobs: Option<TokenLogprobs>, given: &mut Given) {
        let token = Token { id, offset: self.characters, logprobs };
        self.waiting.push_back((self.decoded, token));
        self.drawn += 1;
        let waited = self.detokenizer.as_ref().is_some_and(Detokenizer::is_pending);
        let text = self.detokenizer.as_mut().map_or_else(String::new, |detokenizer| detokenizer.push(id));
        // Bytes before it that turned out to be no character are not this token's.
        let broken = self.detokenizer.as_ref().filter(|_| waited).map_or("", |own| own.broken_before(id, &text));
        if let Some((begin, token)) = self.waiting.back_mut() {
            *begin += broken.len();
            token.offset += broken.chars().count();
        }
        let text = self.decide(&text);
        let settled = self.given == self.decoded && !self.detokenizer.as_ref().is_some_and(Detokenizer::is_pending);
        self.give(&text, settled && !self.stopped, given);
    }

    /// The output ended: what was held back is given out, unless it holds a stop string after all.
    pub fn finish(&mut self, given: &mut Given) {
        if self.stopped {
            return;
        }
        let text = self.detokenizer.as_mut().map_or_else(String::new, Detokenizer::finish);
        let mut text = self.decide(&text);
        if !self.stopped {
            text.push_str(&self.stops.finish());
        }
        self.give(&text, !self.stopped, given);
    }

    /// Of newly decoded text and what is held of older, that which is given out now.
    fn decide(&mut self, text: &str) -> String {
        self.decoded += text.len();
        self.characters += text.chars().count();
        if self.drawn <= self.min_tokens {
            return self.stops.pass(text);
        }
        let (text, matched) = self.stops.push(text);
        self.stopped = matched;
        text
    }

    fn give(&mut self, text: &str, all_tokens: bool, given: &mut Given) {
        given.text.push_str(text);
        self.given += text.len();
        let count = if all_tokens {
            self.waiting.len()
        } else {
            self.waiting.iter().take_while(|(begin, _)| *begin < self.given).count()
        };
        given.tokens.extend(self.waiting.drain(..count).map(|(_, token)| token));
        if self.stopped {
            self.waiting.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::Tokenizer;
    use crate::tokenizer::tests::bytes_tokenizer;

    /// A tokenizer whose tokens are pieces of the bytes of the texts below, at random borders: within characters too.
    fn output(tokenizer: &Arc<Tokenizer>, stop: &[String], min_tokens: u32) -> Output {
        Output::new(Some(Detokenizer::new(Arc::clone(tokenizer))), StopMatcher::new(stop.to_vec()), min_tokens)
    }

    /// All that is given out, and after each token how many bytes and tokens.
    fn run(output: &mut Output, ids: &[u32]) -> (Given, Vec<(usize, usize)>) {
        let (mut all, mut steps) = (Given::default(), Vec::new());
        for id in ids {
            output.push(*id, Some(TokenLogprobs { chosen: -1.0, top: vec![(*id, -1.0)] }), &mut all);
            steps.push((all.text.len(), all.tokens.len()));
            if output.is_stopped() {
                break;
            }
        }
        output.finish(&mut all);
        (all, steps)
    }

    fn ids(given: &Given) -> Vec<u32> {
        given.tokens.iter().map(|token| token.id).collect()
    }

    /// Where a text ends: at the first end of a stop string, and of those that end there, before the longest.
    fn cut<'a>(text: &'a str, stops: &[String]) -> (&'a str, bool) {
        let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        for end in ends {
            let longest = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(String::len).max();
            if let Some(longest) = longest {
                return (&text[..end - longest], true);
            }
        }
        (text, false)
    }

    #[test]
    fn tokens_wait_for_their_character_and_for_stop_strings() {
        let tokenizer = bytes_tokenizer();
        let of = |text: &str| tokenizer.encode(text, false).expect("ids");
        let mut output = output(&tokenizer, &["END".into()], 0);
        let mut push = |text: &str| {
            let mut given = Given::default();
            for id in of(text) {
                output.push(id, None, &mut given);
            }
            (given.text.clone(), given.tokens.len(), output.is_stopped())
        };
        assert_eq!(push("a"), ("a".into(), 1, false));
        assert_eq!(push("E"), (String::new(), 0, false));
        assert_eq!(push("N😀"), ("EN😀".into(), 6, false));
        assert_eq!(push("bE"), ("b".into(), 1, false));
        assert_eq!(push("ND"), (String::new(), 0, true));
    }

    #[test]
    fn a_token_after_a_broken_character_begins_after_it() {
        let tokenizer = bytes_tokenizer();
        let half = tokenizer.encode("é", false).expect("ids")[0];
        let a = tokenizer.encode("a", false).expect("ids")[0];
        let (all, _) = run(&mut output(&tokenizer, &[], 0), &[half, a, a]);
        assert_eq!(all.text, "\u{FFFD}aa");
        assert_eq!(all.tokens.iter().map(|token| token.offset).collect::<Vec<_>>(), [0, 1, 2]);
        // What a stop string cuts off is not given out for the sake of what stands before it.
        let (all, _) = run(&mut output(&tokenizer, &["a".into()], 0), &[half, a]);
        assert_eq!((all.text.as_str(), ids(&all)), ("\u{FFFD}", vec![half]));
    }

    #[test]
    fn special_tokens_are_given_at_once_and_half_characters_at_the_end() {
        let tokenizer = bytes_tokenizer();
        let mut output = output(&tokenizer, &["zz".into()], 0);
        let mut given = Given::default();
        output.push(257, None, &mut given);
        assert_eq!((given.text.as_str(), ids(&given)), ("", vec![257]));
        let half = tokenizer.encode("é", false).expect("ids")[0];
        output.push(half, None, &mut given);
        assert_eq!(given.tokens.len(), 1);
        output.finish(&mut given);
        assert_eq!((given.text.as_str(), ids(&given)), ("\u{FFFD}", vec![257, half]));
    }

    #[test]
    fn without_a_tokenizer_nothing_waits() {
        let mut output = Output::new(None, StopMatcher::default(), 0);
        let mut given = Given::default();
        output.push(5, None, &mut given);
        assert_eq!((given.text.as_str(), ids(&given)), ("", vec![5]));
    }

    /// Texts with characters of one to four bytes, joined emoji, and few different ones, so that overlaps are likely.
    const TEXT: &str = "([abé]|😀|👩‍👩‍👧|日|STOP| ){0,24}";
    const STOP: &str = "([abé]|😀|👩|‍👧|日本|STOP| ){1,4}";

    proptest! {
        // Every byte is a token, so every border of every character is a border of tokens.
        #[test]
        fn nothing_past_a_stop_string_and_nothing_before_it_is_lost(
            text in TEXT,
            stops in prop::collection::vec(STOP, 0..4),
        ) {
            let tokenizer = bytes_tokenizer();
            let all = tokenizer.encode(&text, false).expect("ids");
            let mut output = output(&tokenizer, &stops, 0);
            let (given, steps) = run(&mut output, &all);
            let (whole, stopped) = cut(&text, &stops);
            prop_assert_eq!((given.text.as_str(), output.is_stopped()), (whole, stopped));
            // Byte by byte: the tokens are exactly the bytes of the text.
            prop_assert_eq!(ids(&given), &all[..whole.len()]);
            // What is held back may still become a stop string, or is a part of a character.
            for (at, (given, tokens)) in steps.iter().enumerate().take(whole.len()) {
                prop_assert_eq!(given, tokens, "a byte each");
                let decoded = text.char_indices().map(|(at, _)| at).chain([text.len()]).rfind(|end| *end <= at + 1);
                let held = &text[*given..decoded.unwrap_or(0)];
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)), "{:?} held", held);
            }
            for (at, token) in given.tokens.iter().enumerate() {
                let before = text.char_indices().map(|(at, c)| at + c.len_utf8()).filter(|end| *end <= at).count();
                prop_assert_eq!(token.offset, before);
                prop_assert_eq!(token.logprobs.as_ref().map(|logprobs| logprobs.top[0].0), Some(token.id));
            }
        }

        // Tokens of several bytes that begin and end anywhere, the model's own among them.
        #[test]
        fn tokens_of_any_length_may_straddle_stop_strings(
            text in TEXT,
            stops in prop::collection::vec(STOP, 1..3),
            cuts in prop::collection::vec(1usize..7, 0..40),
        ) {
            let (tokenizer, all) = pieces_tokenizer(&text, &cuts);
            let mut output = output(&tokenizer, &stops, 0);
            let (given, _) = run(&mut output, &all);
            let (whole, stopped) = cut(&text, &stops);
            prop_assert_eq!((given.text.as_str(), output.is_stopped()), (whole, stopped));
            // All tokens that begin in the text, and of those after it none.
            prop_assert!(all.starts_with(&ids(&given)));
            let offsets: Vec<usize> = given.tokens.iter().map(|token| token.offset).collect();
            prop_assert!(offsets.is_sorted() && offsets.iter().all(|offset| *offset <= whole.chars().count()));
            if !stopped {
                prop_assert_eq!(given.tokens.len(), all.len());
            }
        }

        #[test]
        fn nothing_is_looked_for_before_min_tokens(text in TEXT, stop in STOP, min_tokens in 0u32..30) {
            let tokenizer = bytes_tokenizer();
            let all = tokenizer.encode(&text, false).expect("ids");
            let mut output = output(&tokenizer, std::slice::from_ref(&stop), min_tokens);
            let (given, _) = run(&mut output, &all);
            // A character that its last byte brings after them is looked at.
            let from = text.char_indices().map(|(at, _)| at).chain([text.len()]).rfind(|at| *at <= min_tokens as usize);
            let (before, after) = text.split_at(from.unwrap_or(0));
            let (rest, stopped) = cut(after, std::slice::from_ref(&stop));
            prop_assert_eq!(given.text, format!("{before}{rest}"));
            prop_assert_eq!(output.is_stopped(), stopped);
        }
    }

    /// A tokenizer that has the pieces of the text's bytes between these cuts as tokens, and the ids of those.
    fn pieces_tokenizer(text: &str, cuts: &[usize]) -> (Arc<Tokenizer>, Vec<u32>) {
        let mut pieces: Vec<&[u8]> = Vec::new();
        let mut rest = text.as_bytes();
        for cut in cuts {
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            pieces.push(head);
            rest = tail;
        }
        pieces.push(rest);
        pieces.retain(|piece| !piece.is_empty());
        crate::pieces::tests::byte_level(&pieces)
    }
}
