//! Text to ids and back. Knows one model's tokenizer; does not know requests or threads.

use std::collections::HashMap;
use std::sync::Arc;

use hashbrown::HashSet;
use serde_json::Value as Json;
use tokenizers::{Encoding, Token};

use crate::boundaries::Boundaries;

/// The sign that stands for bytes that are no character (yet).
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;
/// Ids that may wait for the rest of their character. No character has more than four bytes, so a longer wait means
/// that the bytes are no text: they are given out as they are.
const MOST_PENDING: usize = 32;

/// A tokenizer as its files define it.
pub struct Tokenizer {
    pub(crate) inner: tokenizers::Tokenizer,
    most_bytes: Option<usize>,
    split: Option<Split>,
    /// Ids that decoding does not leave out.
    read: HashSet<u32>,
}

/// How a text is tokenised piece by piece: the ids of its pieces, one after the other, in this frame.
pub struct Split {
    /// Where it is cut.
    pub boundaries: Boundaries,
    /// Ids before those of a text with special tokens added.
    pub before: Vec<u32>,
    /// Ids after them.
    pub after: Vec<u32>,
}

/// Why a tokenizer does not load or encode.
#[derive(Clone, Debug, thiserror::Error)]
#[error("tokenizer: {0}")]
pub struct TokenizerError(String);

impl From<tokenizers::Error> for TokenizerError {
    fn from(error: tokenizers::Error) -> Self {
        Self(error.to_string())
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`. Truncation and padding in it belong to training and are switched off.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
        inner.with_truncation(None)?.with_padding(None);
        let shape: Option<Shape> = serde_json::from_slice(bytes).ok();
        let vocab = inner.get_vocab(true);
        let most_bytes = shape.as_ref().and_then(|shape| most_bytes(shape, &vocab));
        let special = |token: &str| inner.get_added_vocabulary().is_special_token(token);
        let read = |id: &u32| inner.id_to_token(*id).is_some_and(|token| !special(&token));
        let read = vocab.into_values().filter(read).collect();
        let mut tokenizer = Self { inner, most_bytes, split: None, read };
        tokenizer.split = shape.and_then(|shape| tokenizer.find_split(&shape));
        Ok(tokenizer)
    }

    /// Most bytes of text that a token can stand for; `None` where that has no bound.
    pub fn most_bytes(&self) -> Option<usize> {
        self.most_bytes
    }

    /// How to tokenise a text in pieces; `None` if only the whole gives its ids.
    pub fn split(&self) -> Option<&Split> {
        self.split.as_ref()
    }

    /// Everything that the library does between two added tokens is a function of the text between them. What is left
    /// to look at is chance, the frame, and, because the library is not ours, an example.
    fn find_split(&self, shape: &Shape) -> Option<Split> {
        let chance = [shape.model.dropout, shape.model.alpha];
        if chance.iter().flatten().any(|chance| *chance > 0.0) {
            return None;
        }
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let boundaries = Boundaries::new(added.values())?;
        let (before, after) = self.frame(true)?;
        // Without special tokens the ids are to be the pieces' alone.
        if self.frame(false)? != (Vec::new(), Vec::new()) {
            return None;
        }
        let split = Split { boundaries, before, after };
        let special: Vec<&str> =
            added.values().filter(|token| token.special).map(|token| &*token.content).take(16).collect();
        let example = format!("Hello {} world\n {}\u{e9} 12", special.join(" a,  b"), special.concat());
        for add_special_tokens in [false, true] {
            let whole = self.encode(&example, add_special_tokens).ok()?;
            let mut pieced = Vec::new();
            for piece in split.boundaries.pieces(&example) {
                pieced.extend(self.encode(piece, false).ok()?);
            }
            if add_special_tokens {
                pieced = [&split.before[..], &pieced, &split.after].concat();
            }
            if pieced != whole {
                return None;
            }
        }
        Some(split)
    }

    /// Ids that the post-processor puts before and after those of a text, if it does nothing else with them.
    fn frame(&self, add_special_tokens: bool) -> Option<(Vec<u32>, Vec<u32>)> {
        const TEXT: u32 = u32::MAX;
        let text = Encoding::from_tokens(vec![Token::new(TEXT, String::new(), (0, 0))], 0);
        let framed = self.inner.post_process(text, None, add_special_tokens).ok()?;
        let mut parts = framed.get_ids().split(|id| *id == TEXT).map(<[u32]>::to_vec);
        match (parts.next(), parts.next(), parts.next()) {
            (Some(before), Some(after), None) => Some((before, after)),
            _ => None,
        }
    }

    /// Ids of a text. Slow for long texts: milliseconds, so not on an async thread.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.inner.encode_fast(text, add_special_tokens)?.get_ids().to_vec())
    }

    /// Text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        // Fails only for decoders that reject tokens of their own vocabulary; no text is the honest answer then.
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// Text of ids, special tokens written out.
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// How the vocabulary writes an id; nothing for one that it does not have.
    pub fn token(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_default()
    }

    /// Whether this id is an added token's: such tokens are taken out of a text whole, whatever stands around them.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// Whether decoding leaves this id out wherever it stands.
    pub fn silent(&self, id: u32) -> bool {
        !self.read.contains(&id)
    }
}

/// What of a `tokenizer.json` may make text vanish or shrink, or its ids a matter of chance.
#[derive(serde::Deserialize)]
struct Shape {
    #[serde(default)]
    added_tokens: Vec<Json>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    model: ModelShape,
}

#[derive(serde::Deserialize)]
struct ModelShape {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    alpha: Option<f64>,
}

/// An upper bound, for tokenizers of which we know that every byte of the text is in some token: BPE over bytes or with
/// all bytes to fall back on, and nothing before it that leaves text out.
fn most_bytes(shape: &Shape, vocab: &HashMap<String, u32>) -> Option<usize> {
    let strips = |token: &Json| token["lstrip"] == true || token["rstrip"] == true;
    if shape.model.kind != "BPE" || shape.added_tokens.iter().any(strips) {
        return None;
    }
    let (normalizers, pre_tokenizers) =
        (flat(&shape.normalizer, "normalizers"), flat(&shape.pre_tokenizer, "pretokenizers"));
    let mut shrinks = 1;
    for normalizer in &normalizers {
        match normalizer["type"].as_str()? {
            // Three letters of Hangul become one sign of as many bytes as each of them had; nothing shrinks more.
            "NFC" => shrinks = 4,
            "NFD" | "Prepend" | "ByteLevel" => {}
            "Replace" => {
                let (from, to) = (normalizer["pattern"]["String"].as_str()?, normalizer["content"].as_str()?);
                if to.len() < from.len() {
                    return None;
                }
            }
            _ => return None,
        }
    }
    for pre_tokenizer in &pre_tokenizers {
        match pre_tokenizer["type"].as_str()? {
            "ByteLevel" | "Digits" | "Metaspace" => {}
            "Split" if pre_tokenizer["behavior"] != "Removed" => {}
            _ => return None,
        }
    }
    let whole = if normalizers.iter().chain(&pre_tokenizers).any(|step| step["type"] == "ByteLevel") {
        let bytes = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        bytes.iter().all(|byte| vocab.contains_key(byte.encode_utf8(&mut [0; 4]) as &str))
    } else {
        shape.model.byte_fallback && (0..=255).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")))
    };
    // What a token reads is never longer than how the vocabulary writes it.
    let longest = vocab.keys().map(String::len).max()?;
    whole.then_some(longest * shrinks)
}

/// The steps of a sequence, or the one, or none.
fn flat<'a>(step: &'a Json, list: &str) -> Vec<&'a Json> {
    match step[list].as_array() {
        Some(steps) => steps.iter().flat_map(|step| flat(step, list)).collect(),
        None if step.is_null() => Vec::new(),
        None => vec![step],
    }
}

/// Turns ids into text piece by piece: never a part of a character, and all pieces together are the whole text.
///
/// Ids are decoded in the context of those given out just before, because what a token reads depends on its
/// neighbours (leading spaces, bytes of one character).
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Ids given out last, then the pending ones.
    window: Vec<u32>,
    /// How many ids of the window are given out, and their text.
    given: usize,
    given_text: String,
}

impl Detokenizer {
    /// At the beginning of an output.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, window: Vec::new(), given: 0, given_text: String::new() }
    }

    /// Text that the next id completes; often none, if the id is a part of a character.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.silent(id) {
            return String::new();
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window);
        let stuck = self.window.len() - self.given > MOST_PENDING;
        match text.strip_prefix(&self.given_text) {
            Some(new) if !new.is_empty() && (stuck || !new.ends_with(REPLACEMENT)) => {
                let new = new.to_owned();
                self.advance();
                new
            }
            _ if stuck => self.finish(),
            // What comes changes how those given out would read, as a broken byte does in a run of bytes that stand for
            // themselves. They are out: the pending ones are read alone.
            None => {
                let alone = self.alone();
                if alone.is_empty() || alone.ends_with(REPLACEMENT) {
                    return String::new();
                }
                self.advance();
                alone
            }
            _ => String::new(),
        }
    }

    /// Of text that the last id and those that waited for it gave: what stands before the last id's own, if that is bytes
    /// that are no character.
    pub fn broken_before<'a>(&self, last: u32, text: &'a str) -> &'a str {
        let own = self.tokenizer.decode(&[last]);
        let before = text.strip_suffix(own.as_str()).filter(|_| !own.is_empty());
        before.filter(|before| before.ends_with(REPLACEMENT)).unwrap_or_default()
    }

    /// Whether ids wait for the rest of their character.
    pub fn is_pending(&self) -> bool {
        self.window.len() > self.given
    }

    /// The output ended: whatever is pending, complete or not.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.window);
        let new = text.strip_prefix(&self.given_text).map(str::to_owned);
        let new = new.unwrap_or_else(|| self.alone());
        self.advance();
        new
    }

    /// The pending ids as they read without those given out.
    fn alone(&self) -> String {
        self.tokenizer.decode(&self.window[self.given..])
    }

    fn advance(&mut self) {
        self.window.drain(..self.given);
        self.given = self.window.len();
        self.given_text = self.tokenizer.decode(&self.window);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Byte-level BPE without merges: every byte is a token, so every character of two bytes or more is split. Ids
    /// 0..256 are the bytes in the order of the byte-level alphabet, 256 is `<s>`, 257 is `</s>`.
    pub(crate) fn bytes_tokenizer() -> Arc<Tokenizer> {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(256, "<s>"), special(257, "</s>")],
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
        });
        Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer"))
    }

    fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer));
        let mut out: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        out.push(detokenizer.finish());
        out
    }

    #[test]
    fn a_character_comes_whole_or_not_at_all() {
        let tokenizer = bytes_tokenizer();
        let ids = tokenizer.encode("a😀b", false).expect("ids");
        assert_eq!(ids.len(), 6);
        assert_eq!(pieces(&tokenizer, &ids), ["a", "", "", "", "😀", "b", ""]);
    }

    #[test]
    fn what_a_token_can_stand_for_is_bounded_where_nothing_vanishes() {
        assert_eq!(bytes_tokenizer().most_bytes(), Some(4), "</s>");
        let words = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"},
        });
        let words = Tokenizer::from_json(words.to_string().as_bytes()).expect("a tokenizer");
        assert_eq!(words.most_bytes(), None, "an unknown word may be of any length");
    }

    #[test]
    fn special_and_unknown_ids_are_silent() {
        let tokenizer = bytes_tokenizer();
        let mut ids = tokenizer.encode("é", false).expect("ids");
        ids.splice(1..1, [256, 9999, 257]);
        assert_eq!(pieces(&tokenizer, &ids).concat(), "é");
    }

    #[test]
    fn an_unfinished_character_is_given_out_at_the_end() {
        let tokenizer = bytes_tokenizer();
        let ids = tokenizer.encode("x😀", false).expect("ids");
        assert_eq!(pieces(&tokenizer, &ids[..3]).concat(), tokenizer.decode(&ids[..3]));
    }

    proptest! {
        #[test]
        fn all_pieces_are_the_whole(text in "\\PC{0,20}") {
            let tokenizer = bytes_tokenizer();
            let ids = tokenizer.encode(&text, false).expect("ids");
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
        }

        #[test]
        fn any_bytes_decode_to_the_whole(ids in prop::collection::vec(0u32..258, 0..60)) {
            let tokenizer = bytes_tokenizer();
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids));
        }
    }
}
