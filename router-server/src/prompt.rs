//! A prompt of `/v1/completions` in any of the forms OpenAI allows.
//!
//! It has a parser of its own, because a list of a million ids as JSON values would take a hundred times its size.

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Most prompts of one request.
pub const MOST_PROMPTS: usize = 1024;

/// A prompt as it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Tokenised by the client.
    Ids(Vec<u32>),
    /// Neither; what it is instead.
    Other(&'static str),
    /// More than one prompt, each text or ids.
    Several(Vec<Prompt>),
}

impl Prompt {
    /// Whether there is nothing to go on from.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Ids(ids) => ids.is_empty(),
            Self::Several(prompts) => prompts.is_empty(),
            Self::Other(_) => true,
        }
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a prompt")
    }
    fn visit_str<E>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }
    fn visit_string<E>(self, text: String) -> Result<Prompt, E> {
        Ok(Prompt::Text(text))
    }
    fn visit_bool<E>(self, _: bool) -> Result<Prompt, E> {
        Ok(Prompt::Other("a boolean"))
    }
    fn visit_i64<E>(self, _: i64) -> Result<Prompt, E> {
        Ok(Prompt::Other("a number"))
    }
    fn visit_u64<E>(self, _: u64) -> Result<Prompt, E> {
        Ok(Prompt::Other("a number"))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Prompt, E> {
        Ok(Prompt::Other("a number"))
    }
    fn visit_unit<E>(self) -> Result<Prompt, E> {
        Ok(Prompt::Other("null"))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Prompt, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Prompt::Other("an object"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
        let mut ids = Vec::new();
        let mut other = None;
        let mut prompts = Vec::new();
        while let Some(item) = seq.next_element::<Item>()? {
            match item {
                Item::Id(id) if prompts.is_empty() => ids.push(id),
                Item::Prompt(_) if prompts.len() == MOST_PROMPTS => other = Some(Prompt::Other("too many prompts")),
                Item::Prompt(prompt) if ids.is_empty() => prompts.push(prompt),
                _ => other = Some(Prompt::Other("a list with items that are no token ids")),
            }
        }
        Ok(other.unwrap_or_else(|| match prompts.len() {
            0 => Prompt::Ids(ids),
            1 => prompts.remove(0),
            _ => Prompt::Several(prompts),
        }))
    }
}

/// An item of a list that stands for a prompt.
enum Item {
    Id(u32),
    Prompt(Prompt),
    Other,
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a token id or a prompt")
            }
            fn visit_u64<E>(self, id: u64) -> Result<Item, E> {
                Ok(u32::try_from(id).map_or(Item::Other, Item::Id))
            }
            fn visit_i64<E>(self, _: i64) -> Result<Item, E> {
                Ok(Item::Other)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Item, E> {
                Ok(Item::Other)
            }
            fn visit_bool<E>(self, _: bool) -> Result<Item, E> {
                Ok(Item::Other)
            }
            fn visit_unit<E>(self) -> Result<Item, E> {
                Ok(Item::Other)
            }
            fn visit_str<E>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Prompt(Prompt::Text(text.to_owned())))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Item, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Item::Other)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Item, A::Error> {
                let mut ids = Vec::new();
                let mut whole = true;
                while let Some(id) = seq.next_element::<Value>()? {
                    match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
                        Some(id) => ids.push(id),
                        None => whole = false,
                    }
                }
                Ok(if whole { Item::Prompt(Prompt::Ids(ids)) } else { Item::Other })
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}
