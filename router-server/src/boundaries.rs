//! Where a text may be cut so that its pieces, each tokenised alone, give the ids of the whole.
//!
//! The tokenizers library first takes out all added tokens that match the raw text, leftmost and longest, and then
//! normalises, splits and tokenises what stands between two of them without a look at the rest. So a text may be cut
//! before such a token, if that token takes nothing of its surroundings with it. Knows added tokens; knows no ids.

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

/// The added tokens of a tokenizer, and before which of them a text may be cut.
pub struct Boundaries {
    tokens: AhoCorasick,
    /// Whether a piece may begin with this token.
    begins: Vec<bool>,
}

impl Boundaries {
    /// `None` if no token is a boundary.
    ///
    /// All tokens that match the raw text have to be looked for, because one that is no boundary may cover one that is.
    /// A boundary is special, since such tokens are what templates put between messages; it strips no spaces; and it
    /// does not begin with a space, which a token before it could strip. Where a token is to match single words only,
    /// nothing is cut: that rule looks at the letters beyond the match.
    pub fn new<'a>(added: impl IntoIterator<Item = &'a AddedToken>) -> Option<Self> {
        let raw: Vec<&AddedToken> =
            added.into_iter().filter(|token| !token.normalized && !token.content.is_empty()).collect();
        if raw.iter().any(|token| token.single_word) {
            return None;
        }
        let spaced = |token: &AddedToken| token.content.starts_with(char::is_whitespace);
        let begins = |token: &&AddedToken| token.special && !token.lstrip && !token.rstrip && !spaced(token);
        let begins: Vec<bool> = raw.iter().map(begins).collect();
        if !begins.contains(&true) {
            return None;
        }
        let tokens = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(raw.iter().map(|token| &token.content))
            .ok()?;
        Some(Self { tokens, begins })
    }

    /// The pieces of a text: none is empty, together they are the text, each but perhaps the first begins with a boundary.
    ///
    /// Boundaries that follow each other at once, as the end of a message and the beginning of the next, are one: a cut
    /// stands where text ends. So a text has no more pieces than it needs to be known up to every message.
    pub fn pieces<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        // Where the run of boundaries ends that the last one found belongs to.
        let mut run_ends = 0;
        let starts = self.tokens.find_iter(text).filter_map(move |found| {
            let begins = self.begins[found.pattern().as_usize()];
            let goes_on = found.start() == run_ends;
            if begins {
                run_ends = found.end();
            }
            (begins && !goes_on).then_some(found.start())
        });
        let mut from = 0;
        starts.chain(std::iter::once(text.len())).filter_map(move |to| {
            let piece = &text[from..to];
            from = to;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn special(content: &str) -> AddedToken {
        AddedToken::from(content, true)
    }

    fn cut(tokens: &[AddedToken], text: &str) -> Vec<String> {
        let boundaries = Boundaries::new(tokens).expect("a boundary");
        boundaries.pieces(text).map(str::to_owned).collect()
    }

    #[test]
    fn a_piece_begins_with_a_boundary() {
        let tokens = [special("<s>"), special("</s>")];
        assert_eq!(cut(&tokens, "<s>a</s></s>é<s>"), ["<s>a", "</s></s>é", "<s>"]);
        assert_eq!(cut(&tokens, "<s></s><s>"), ["<s></s><s>"]);
        assert_eq!(cut(&tokens, "a<s>b"), ["a", "<s>b"]);
        assert_eq!(cut(&tokens, "a"), ["a"]);
        assert!(cut(&tokens, "").is_empty());
    }

    #[test]
    fn a_longer_token_covers_a_boundary() {
        let tokens = [special("<s>"), special("a<s>").rstrip(true), special("<s><s>").special(false)];
        assert_eq!(cut(&tokens, "a<s>b<s>c<s><s><s>"), ["a<s>b", "<s>c<s><s>", "<s>"]);
    }

    #[test]
    fn what_looks_at_its_surroundings_is_no_boundary() {
        let none = [
            vec![],
            vec![special("<s>").lstrip(true), special("</s>").rstrip(true), special("\n<s>")],
            vec![special("<s>").special(false)],
            vec![special("<s>").normalized(true)],
            vec![special("<s>"), special("word").single_word(true)],
        ];
        for tokens in none {
            assert!(Boundaries::new(&tokens).is_none(), "{tokens:?}");
        }
    }
}
