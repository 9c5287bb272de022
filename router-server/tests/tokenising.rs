//! A prompt is tokenised piece by piece and only once, and its ids are those of the whole, or those that were generated.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::{Arc, LazyLock};

use common::{Router, Worker, config};
use proptest::prelude::*;
use router_server::conversation::Conversations;
use router_server::tokenizer::{Detokenizer, Tokenizer};
use serde_json::{Value, json};

fn airline() -> Value {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/airline-tiny/tokenizer.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn tokenizer(file: &Value) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_json(file.to_string().as_bytes()).unwrap())
}

/// Tokens that meet each other in every way: they strip, cover, begin with spaces, are matched before or after the text
/// is normalised.
fn added(first_id: u32) -> Vec<Value> {
    let table = [
        ("<s>", "special"),
        ("</s>", "special"),
        ("<s></s>", "special"),
        ("<|a|>", "special lstrip"),
        ("<|b|>", "special rstrip"),
        ("\n<s>", "special"),
        ("<|c|>", "special lstrip rstrip"),
        ("e<s", ""),
        ("Word", "normalized"),
        ("<norm>", "special normalized"),
    ];
    let token = |(at, (content, flags)): (usize, (&str, &str))| {
        let has = |flag: &str| flags.split(' ').any(|given| given == flag);
        json!({"id": first_id + u32::try_from(at).unwrap(), "content": content, "single_word": false,
               "lstrip": has("lstrip"), "rstrip": has("rstrip"), "normalized": has("normalized"), "special": has("special")})
    };
    table.into_iter().enumerate().map(token).collect()
}

fn template(first_id: u32) -> Value {
    let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({"type": "TemplateProcessing",
           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                      {"SpecialToken": {"id": "</s>", "type_id": 0}}],
           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
           "special_tokens": {"<s>": special("<s>", first_id), "</s>": special("</s>", first_id + 1)}})
}

fn file(model: Value, added: Vec<Value>, parts: Value) -> Value {
    let mut file = json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
                          "pre_tokenizer": null, "post_processor": null, "decoder": null});
    file["model"] = model;
    file["added_tokens"] = added.into();
    file.as_object_mut().unwrap().extend(parts.as_object().unwrap().clone());
    file
}

/// Like Llama 2's: bytes to fall back on, and `▁` for spaces, put before the text by one of several steps.
fn sentence_piece(parts: Value) -> Value {
    let mut vocab: Vec<String> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    vocab.extend("▁abcdehlorstw<>|/WH".chars().map(String::from));
    let merges =
        [["h", "e"], ["▁", "he"], ["l", "l"], ["he", "ll"], ["▁he", "ll"], ["▁", "w"], ["o", "r"], ["▁w", "or"]];
    vocab.extend(merges.iter().map(|pair| pair.concat()));
    let vocab: serde_json::Map<_, _> = vocab.into_iter().zip(0u32..).map(|(token, id)| (token, json!(id))).collect();
    let first = u32::try_from(vocab.len()).unwrap();
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                       "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                       "vocab": vocab, "merges": merges});
    let mut parts = parts;
    parts["post_processor"] = template(first);
    parts["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    file(model, added(first), parts)
}

fn metaspace(scheme: &str, split: bool) -> Value {
    let step = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    sentence_piece(json!({"pre_tokenizer": step}))
}

fn word_piece() -> Value {
    let words = ["[UNK]", "hello", "word", "##s", "wor", "a", "b", "<", ">", "/", "s", "|", "e", "##e"];
    let vocab: serde_json::Map<_, _> =
        words.into_iter().zip(0u32..).map(|(word, id)| (word.into(), json!(id))).collect();
    let first = u32::try_from(vocab.len()).unwrap();
    let model = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                       "max_input_chars_per_word": 100, "vocab": vocab});
    file(
        model,
        added(first),
        json!({"normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                              "strip_accents": null, "lowercase": true},
               "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
               "post_processor": {"type": "BertProcessing", "sep": ["</s>", first + 1], "cls": ["<s>", first]}}),
    )
}

static TOKENIZERS: LazyLock<Vec<(&str, Arc<Tokenizer>)>> = LazyLock::new(|| {
    let mut bytes = airline();
    let more = added(2600);
    bytes["added_tokens"].as_array_mut().unwrap().extend(more);
    bytes["normalizer"] = json!({"type": "NFC"});
    let prepend = json!({"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}});
    let strip = json!({"normalizer": {"type": "Strip", "strip_left": true, "strip_right": true}});
    let files = [
        ("byte level", bytes),
        ("prepend", sentence_piece(prepend)),
        ("strip", sentence_piece(strip)),
        ("metaspace first", metaspace("first", false)),
        ("metaspace always", metaspace("always", true)),
        ("metaspace never", metaspace("never", true)),
        ("word piece", word_piece()),
    ];
    files.into_iter().map(|(name, file)| (name, tokenizer(&file))).collect()
});

/// Tokens, parts of tokens, and what stands between them.
static FRAGMENTS: &[&str] = &[
    "<s>",
    "</s>",
    "<|a|>",
    "<|b|>",
    "<|c|>",
    "<norm>",
    "<|end|>",
    "<|user|>",
    "<tool_call>",
    "Word",
    "word",
    "hello",
    "he",
    "s>",
    "e<s",
    "e",
    "<",
    "|>",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "e\u{301}",
    "\u{301}",
    "😀",
    "a",
    "ß",
    "\u{a0}",
    "12",
    "▁",
    "'s",
];

fn texts() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(FRAGMENTS), 0..24).prop_map(|parts| parts.concat())
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn all_of_them_are_cut() {
    for (name, tokenizer) in TOKENIZERS.iter() {
        let split = tokenizer.split().unwrap_or_else(|| panic!("{name} is not cut"));
        assert_eq!(split.boundaries.pieces("a<s>b</s>").count(), 3, "{name}");
        assert_eq!(split.before.is_empty(), *name == "byte level");
    }
}

#[test]
fn what_cannot_be_cut_is_tokenised_whole() {
    let mut chance = airline();
    chance["model"]["dropout"] = json!(0.1);
    let mut words = airline();
    words["added_tokens"][1]["single_word"] = true.into();
    let mut twice = airline();
    let own = json!({"Sequence": {"id": "A", "type_id": 0}});
    twice["post_processor"]["single"] = json!([own, own]);
    for (name, file) in [("chance", chance), ("words", words), ("twice", twice)] {
        assert!(tokenizer(&file).split().is_none(), "{name}");
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn pieces_give_the_ids_of_the_whole(text in texts()) {
        for (name, tokenizer) in TOKENIZERS.iter() {
            let split = tokenizer.split().unwrap();
            let pieces: Vec<&str> = split.boundaries.pieces(&text).collect();
            prop_assert_eq!(pieces.concat(), text.clone());
            let ids: Vec<u32> = pieces.iter().flat_map(|piece| tokenizer.encode(piece, false).unwrap()).collect();
            prop_assert_eq!(&ids, &tokenizer.encode(&text, false).unwrap(), "{}: {:?}", name, pieces);
            let framed = [&split.before[..], &ids, &split.after].concat();
            prop_assert_eq!(framed, tokenizer.encode(&text, true).unwrap(), "{}", name);
        }
    }

    #[test]
    fn what_is_known_changes_no_ids(texts in prop::collection::vec(texts(), 1..8), most_bytes in 0usize..8000) {
        for (name, tokenizer) in TOKENIZERS.iter() {
            let conversations = Arc::new(Conversations::new(most_bytes));
            let mut so_far = String::new();
            for text in texts.iter().chain(&texts) {
                so_far.push_str(text);
                for text in [text, &so_far] {
                    let (ids, _) = conversations.encode(tokenizer, tokenizer.split().unwrap(), text).unwrap();
                    prop_assert_eq!(ids, tokenizer.encode(text, false).unwrap(), "{}", name);
                }
            }
        }
    }

    /// Whatever was generated: if its text comes back, it has those ids or those of the tokenizer, and reads the same.
    #[test]
    fn an_answer_keeps_its_ids(prompt in texts(), answer in prop::collection::vec(0u32..2700, 1..30)) {
        for (name, tokenizer) in TOKENIZERS.iter() {
            let split = tokenizer.split().unwrap();
            let prompt = format!("{prompt}<s>he");
            let conversations = Arc::new(Conversations::default());
            let (first, turn) = conversations.encode(tokenizer, split, &prompt).unwrap();
            let mut turn = turn.unwrap();
            answer.chunks(3).for_each(|ids| turn.push(ids));
            turn.learn();
            let read = tokenizer.decode(&answer);
            let next = format!("{prompt}{read}</s>hello");
            let (second, _) = conversations.encode(tokenizer, split, &next).unwrap();
            let alone = tokenizer.encode(&next, false).unwrap();
            if second != alone {
                let generated = [&first[..], &answer[..]].concat();
                let silent = usize::from(tokenizer.silent(*answer.last().unwrap()));
                prop_assert!(second.starts_with(&generated[..generated.len() - silent]), "{}", name);
                let read = tokenizer.decode(&first) + &read;
                prop_assert!(tokenizer.decode(&second).starts_with(&read), "{}", name);
                prop_assert!(second.ends_with(&tokenizer.encode("</s>hello", false).unwrap()), "{}", name);
            }
        }
    }
}

#[test]
fn silent_ids_are_those_that_read_nothing() {
    // Of this one every other token reads something, even where it stands alone.
    let (_, tokenizer) = &TOKENIZERS[0];
    let (silent, reads): (Vec<u32>, Vec<u32>) = (0..3000).partition(|id| tokenizer.silent(*id));
    let nothing: Vec<u32> = (0..3000).filter(|id| tokenizer.decode(&[*id]).is_empty()).collect();
    assert_eq!(silent, nothing);
    assert!(reads.len() > 2000 && silent.len() > 300, "special tokens, and ids that are none");
}

#[test]
fn the_next_turn_has_the_ids_that_were_generated() {
    let tokenizer = tokenizer(&airline());
    let split = tokenizer.split().unwrap();
    let conversations = Arc::new(Conversations::default());
    let prompt = "<|user|>Hi<|end|><|assistant|>";
    let (first, turn) = conversations.encode(&tokenizer, split, prompt).unwrap();
    // letter by letter, which is not how the tokenizer would spell it, and ended by a token without a text
    let spelled: Vec<u32> = "Hello".chars().flat_map(|c| tokenizer.encode(&c.to_string(), false).unwrap()).collect();
    let end = tokenizer.encode("<|end|>", false).unwrap();
    let mut turn = turn.unwrap();
    turn.push(&spelled[..2]);
    turn.push(&[&spelled[2..], &end].concat());
    turn.learn();
    let next = format!("{prompt}Hello<|end|><|user|>And?<|end|><|assistant|>");
    let (second, _) = conversations.encode(&tokenizer, split, &next).unwrap();
    let generated = [first, spelled, end].concat();
    assert!(second.starts_with(&generated), "{second:?}");
    assert!(!tokenizer.encode(&next, false).unwrap().starts_with(&generated), "else nothing is shown");
    assert_eq!(tokenizer.decode(&second), tokenizer.decode(&tokenizer.encode(&next, false).unwrap()));
    // In another conversation the same text is what the tokenizer says.
    let other = next.replace("Hi", "Ho");
    let (ids, _) = conversations.encode(&tokenizer, split, &other).unwrap();
    assert_eq!(ids, tokenizer.encode(&other, false).unwrap());
}

/// Whoever sends this text means what it says: a message that is empty and the next, or a sign that is one.
#[test]
fn an_answer_that_its_text_does_not_tell_is_not_learned() {
    let tokenizer = tokenizer(&airline());
    let split = tokenizer.split().unwrap();
    let letters = |text: &str| -> Vec<u32> {
        text.chars().flat_map(|c| tokenizer.encode(&c.to_string(), false).unwrap()).collect()
    };
    let half = tokenizer.encode("é", false).unwrap()[..1].to_vec();
    let prompt = "<|user|>Hi<|end|><|assistant|>";
    for (answer, text) in
        [(letters("<|end|><|user|>Bye"), "<|end|><|user|>Bye"), ([letters("a"), half].concat(), "a\u{fffd}")]
    {
        assert_eq!(tokenizer.decode(&answer), text);
        let conversations = Arc::new(Conversations::default());
        let mut turn = conversations.encode(&tokenizer, split, prompt).unwrap().1.unwrap();
        turn.push(&answer);
        turn.learn();
        let next = format!("{prompt}{text}<|end|>");
        let (ids, _) = conversations.encode(&tokenizer, split, &next).unwrap();
        assert_eq!(ids, tokenizer.encode(&next, false).unwrap(), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_turn_finds_the_first_ones_answer_in_the_cache() {
    let worker = Worker::start("").await;
    let router = Router::over(&[&worker], config()).await;
    let mut messages: Vec<Value> = Vec::new();
    let mut known: Vec<u64> = Vec::new();
    let mut turns = 0;
    // A mock draws broken bytes too, which no text tells: then more is asked, as what it draws is by place.
    for attempt in 0..200 {
        messages.push(json!({"role": "user", "content": "Tell me of the sea".to_owned() + &" too".repeat(attempt)}));
        let body = json!({"model": "tiny", "messages": messages, "max_tokens": 20, "stream": true,
                          "stream_options": {"include_usage": true}, "return_token_ids": true});
        let answer = router.post("/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let events = answer.events();
        let prompt: Vec<u64> = serde_json::from_value(events[0]["prompt_token_ids"].clone()).unwrap();
        assert!(prompt.starts_with(&known), "turn {turns}: the prompt goes on from what was generated");
        let cached = events.last().unwrap()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        let computed = known.len().saturating_sub(1) as u64;
        assert!(cached >= computed / 16 * 16, "turn {turns}: all whole blocks, the answer's too");
        let deltas = events.iter().filter_map(|event| event["choices"].get(0));
        let text: String = deltas.clone().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        if text.contains(char::REPLACEMENT_CHARACTER) {
            messages.pop();
            continue;
        }
        let ids = deltas.filter_map(|choice| choice["token_ids"].as_array()).flatten().filter_map(Value::as_u64);
        known = prompt.into_iter().chain(ids).collect();
        messages.push(json!({"role": "assistant", "content": text}));
        turns += 1;
        if turns == 4 {
            return;
        }
    }
    panic!("only {turns} answers were text");
}

fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer));
    let text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
    text + &detokenizer.finish()
}

proptest! {
    #![proptest_config(cases(100))]

    #[test]
    fn text_comes_back_in_pieces_as_it_went(text in texts()) {
        for (name, tokenizer) in TOKENIZERS.iter() {
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(pieces(tokenizer, &ids), tokenizer.decode(&ids), "{}", name);
        }
    }
}

#[test]
fn a_broken_byte_does_not_take_back_what_was_read() {
    let (_, tokenizer) = TOKENIZERS.iter().find(|(name, _)| *name == "prepend").unwrap();
    let he = tokenizer.encode("he", false).unwrap();
    // Together the three bytes are no text, and the library reads all of them as broken. By then é is out.
    let ids = [&[0xC3, 0xA9, 0xFF], &he[..], &[0xE2, 0x82]].concat();
    assert_eq!(pieces(tokenizer, &ids), "é\u{fffd} he\u{fffd}\u{fffd}");
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer));
    let parts: Vec<String> = ids[..4].iter().map(|id| detokenizer.push(*id)).collect();
    assert_eq!(parts, ["", "é", "", "\u{fffd} he"], "nothing waits for more than the next character");
}
