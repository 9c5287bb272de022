//! Stop strings, matched over token borders.
//!
//! Knows text only. Text that may be the beginning of a stop string is held back until that is decided, so a client
//! never sees a part of one. The match that ends first wins; of those that end together, the longest.

use std::sync::Arc;

/// Looks for stop strings in text that comes in pieces. A clone has the same strings and a text of its own.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Arc<[String]>,
    held: String,
}

impl StopMatcher {
    /// Empty strings are ignored: they would match before the first letter.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, held: String::new() }
    }

    /// Takes the next piece. Returns text that is safe to give out, and whether a stop string has matched; after a
    /// match nothing more is to be pushed.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at))).min();
        if let Some((_, at)) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let safe = self.held.len() - self.undecided();
        let kept = self.held.split_off(safe);
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// Takes a piece in which nothing is to be matched, and gives out all there is.
    pub fn pass(&mut self, text: &str) -> String {
        self.held.push_str(text);
        std::mem::take(&mut self.held)
    }

    /// The text ended: what was held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that may be the beginning of a stop string.
    fn undecided(&self) -> usize {
        let longest = |stop: &String| {
            let borders = stop.char_indices().map(|(at, _)| at).skip(1).take_while(|at| *at <= self.held.len());
            borders.filter(|&at| self.held.ends_with(&stop[..at])).last().unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by looking at every end, one character at a time.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        for end in ends {
            let matched = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            if let Some(longest) = matched.map(String::len).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn pieces(text: &str, cuts: &[usize]) -> Vec<String> {
        let chars: Vec<char> = text.chars().collect();
        let mut out = Vec::new();
        let mut rest = chars.as_slice();
        for cut in cuts {
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            out.push(head.iter().collect());
            rest = tail;
        }
        out.push(rest.iter().collect());
        out
    }

    fn run(stops: &mut StopMatcher, pieces: &[String]) -> (String, bool) {
        let mut out = String::new();
        for piece in pieces {
            let (text, matched) = stops.push(piece);
            out.push_str(&text);
            if matched {
                return (out, true);
            }
        }
        out.push_str(&stops.finish());
        (out, false)
    }

    #[test]
    fn holds_back_only_what_may_match() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "é!".into()]);
        assert_eq!(matcher.push("the E"), ("the ".into(), false));
        assert_eq!(matcher.push("N"), (String::new(), false));
        assert_eq!(matcher.push("Té"), ("ENT".into(), false));
        assert_eq!(matcher.push("!x"), (String::new(), true));
    }

    proptest! {
        // A small alphabet makes overlaps likely.
        #[test]
        fn splits_change_nothing(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            cuts in prop::collection::vec(0usize..5, 0..20),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            prop_assert_eq!(run(&mut matcher, &pieces(&text, &cuts)), naive(&text, &stops));
        }

        #[test]
        fn nothing_given_out_is_ever_part_of_the_match(
            text in "[ab]{0,30}",
            stop in "[ab]{1,4}",
            cuts in prop::collection::vec(0usize..3, 0..20),
        ) {
            let mut matcher = StopMatcher::new(vec![stop.clone()]);
            let (whole, _) = naive(&text, std::slice::from_ref(&stop));
            let mut given = String::new();
            for piece in pieces(&text, &cuts) {
                let (out, matched) = matcher.push(&piece);
                given.push_str(&out);
                prop_assert!(whole.starts_with(&given));
                if matched { break; }
            }
        }
    }
}
