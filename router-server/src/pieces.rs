//! What single tokens read, for logprobs: their bytes, which alone need not be text.
//!
//! Knows how the two great families of vocabularies write bytes: byte-level BPE (a sign for every byte) and
//! `SentencePiece` (`▁` for a space, `<0xE2>` for a byte).

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, LazyLock};

use serde_json::Value;

use crate::tokenizer::Tokenizer;

/// How a vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// A sign for each byte.
    ByteLevel,
    /// As text, but for spaces and single bytes.
    SentencePiece,
    /// As it is.
    Plain,
}

/// The bytes of a model's tokens.
#[derive(Clone)]
pub struct Pieces {
    tokenizer: Option<Arc<Tokenizer>>,
    spelling: Spelling,
}

impl Pieces {
    /// Of this tokenizer; without one no token has bytes.
    pub fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        let decoder = tokenizer.as_ref().and_then(|tokenizer| tokenizer.inner.get_decoder());
        let decoder = decoder.and_then(|decoder| serde_json::to_string(decoder).ok()).unwrap_or_default();
        let has = |kind: &str| decoder.contains(&format!("\"type\":\"{kind}\""));
        let spelling = if has("ByteLevel") {
            Spelling::ByteLevel
        } else if has("Metaspace") || has("ByteFallback") || decoder.contains('▁') {
            Spelling::SentencePiece
        } else {
            Spelling::Plain
        };
        Self { tokenizer, spelling }
    }

    /// The bytes of a token; `None` for an id without one.
    pub fn bytes(&self, id: u32) -> Option<Vec<u8>> {
        let tokenizer = self.tokenizer.as_ref()?;
        let spelled = tokenizer.inner.id_to_token(id)?;
        if tokenizer.is_added(id) {
            return Some(spelled.into_bytes());
        }
        Some(match self.spelling {
            Spelling::ByteLevel => {
                let bytes: Option<Vec<u8>> = spelled.chars().map(|sign| BYTES.get(&sign).copied()).collect();
                bytes.unwrap_or_else(|| spelled.into_bytes())
            }
            Spelling::SentencePiece => {
                byte(&spelled).map_or_else(|| spelled.replace('▁', " ").into_bytes(), |byte| vec![byte])
            }
            Spelling::Plain => spelled.into_bytes(),
        })
    }

    /// A token as OpenAI writes it: its text, and `\xf0\x9f` for what is none. Without a tokenizer, `token_id:5`.
    pub fn token(&self, id: u32) -> (String, Value) {
        let Some(bytes) = self.bytes(id) else { return (format!("token_id:{id}"), Value::Null) };
        let numbers = Value::from(bytes.as_slice());
        let text = String::from_utf8(bytes).unwrap_or_else(|error| {
            error.as_bytes().iter().fold(String::new(), |mut text, byte| {
                // Writing to a string does not fail.
                let _ = write!(text, "\\x{byte:02x}");
                text
            })
        });
        (text, numbers)
    }
}

/// `<0xE2>`
fn byte(spelled: &str) -> Option<u8> {
    let digits = spelled.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte-level alphabet: printable bytes of Latin-1 stand for themselves, the others for the signs from U+0100 on.
static BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let (own, moved): (Vec<u8>, Vec<u8>) = (0..=u8::MAX).partition(printable);
    let own = own.into_iter().map(|byte| (char::from(byte), byte));
    let moved = moved.into_iter().zip('\u{100}'..).map(|(byte, sign)| (sign, byte));
    own.chain(moved).collect()
});

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    fn sign(byte: u8) -> char {
        BYTES.iter().find(|(_, of)| **of == byte).map(|(sign, _)| *sign).expect("every byte has a sign")
    }

    /// A byte-level tokenizer with exactly these tokens, and their ids.
    pub(crate) fn byte_level(tokens: &[&[u8]]) -> (Arc<Tokenizer>, Vec<u32>) {
        let spelled = |token: &&[u8]| token.iter().map(|byte| sign(*byte)).collect::<String>();
        let mut vocab = serde_json::Map::new();
        let mut ids = Vec::new();
        for token in tokens.iter().map(spelled) {
            let next = vocab.len();
            ids.push(vocab.entry(token).or_insert(json!(next)).as_u64().expect("a number") as u32);
        }
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
        });
        (Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer")), ids)
    }

    #[test]
    fn the_alphabet_is_the_tokenizers() {
        assert_eq!(BYTES.len(), 256);
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert!(BYTES.keys().all(|sign| theirs.contains(sign)));
        assert_eq!((BYTES[&'Ġ'], BYTES[&'Ċ'], BYTES[&'a']), (b' ', b'\n', b'a'));
    }

    #[test]
    fn a_token_reads_as_openai_writes_it() {
        let emoji = "😀".as_bytes();
        let (tokenizer, ids) = byte_level(&[b" hi", &emoji[..2], &emoji[2..], emoji]);
        let pieces = Pieces::new(Some(tokenizer));
        let all: Vec<_> = ids.iter().map(|id| pieces.token(*id)).collect();
        assert_eq!(all[0], (" hi".into(), json!([32, 104, 105])));
        assert_eq!(all[1], (r"\xf0\x9f".into(), json!([0xf0, 0x9f])));
        assert_eq!(all[2], (r"\x98\x80".into(), json!([0x98, 0x80])));
        assert_eq!(all[3].0, "😀");
        assert_eq!(pieces.token(77), ("token_id:77".into(), Value::Null));
        assert_eq!(Pieces::new(None).token(5), ("token_id:5".into(), Value::Null));
    }

    #[test]
    fn sentencepiece_has_its_own_spelling() {
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
                      "vocab": {"<unk>": 0, "▁hi": 1, "<0xE2>": 2, "<s>": 3}, "merges": []},
        });
        let tokenizer = Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).expect("a tokenizer"));
        let pieces = Pieces::new(Some(tokenizer));
        assert_eq!(pieces.bytes(1).as_deref(), Some(&b" hi"[..]));
        assert_eq!(pieces.bytes(2).as_deref(), Some(&[0xE2][..]));
        assert_eq!(pieces.bytes(3).as_deref(), Some(&b"<s>"[..]));
    }
}
