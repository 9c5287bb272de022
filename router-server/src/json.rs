//! JSON as a chat template reads it: a body's messages and tools are parsed straight into a template's values, so that
//! each text of a long conversation is copied once. Order of keys is kept, and of equal keys the last one counts.
//!
//! Knows JSON and a template's values; does not know what a message is.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object, ObjectExt, ValueKind};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// Members that are found sooner by looking at each than by hashing a name.
const FEW: usize = 12;

/// A value that was JSON.
pub struct Parsed(pub Value);

/// An object that was JSON.
#[derive(Clone, Debug, Default)]
pub struct Members {
    all: Vec<(Value, Value)>,
    /// Where each is, if they are more than [`FEW`].
    places: Option<HashMap<Value, usize>>,
}

impl Members {
    /// Names and values, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &(Value, Value)> {
        self.all.iter()
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.place(name).map(|at| &self.all[at].1)
    }

    fn place(&self, name: &str) -> Option<usize> {
        match &self.places {
            None => self.all.iter().position(|(own, _)| own.as_str() == Some(name)),
            Some(places) => places.get(&Value::from(name)).copied(),
        }
    }

    /// Another value for this name, or one more name.
    pub fn set(&mut self, name: Value, value: Value) {
        if let Some(at) = name.as_str().and_then(|name| self.place(name)) {
            self.all[at].1 = value;
            return;
        }
        let at = self.all.len();
        self.all.push((name.clone(), value));
        match &mut self.places {
            Some(places) => {
                places.insert(name, at);
            }
            None if at < FEW => {}
            None => self.places = Some(self.all.iter().zip(0..).map(|((name, _), at)| (name.clone(), at)).collect()),
        }
    }
}

impl Object for Members {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.get(key).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_rev_key_value_enumerator(|members| Box::new(members.all.iter().cloned()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.all.len())
    }
}

/// The members of an object; `None` if it is none.
pub fn members(value: &Value) -> Option<&Members> {
    value.downcast_object_ref()
}

/// The member of this name, if the value is an object that has it.
pub fn member<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    members(value)?.get(name)
}

/// The items of a list; `None` if it is none.
pub fn items(value: &Value) -> Option<&[Value]> {
    value.downcast_object_ref::<Vec<Value>>().map(Vec::as_slice)
}

/// What a value is, for messages; what is not there is null.
pub fn kind_of(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Bool => "a boolean",
        ValueKind::Number => "a number",
        ValueKind::String => "a string",
        ValueKind::Seq => "a list",
        ValueKind::Map => "an object",
        _ => "null",
    }
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ParsedVisitor).map(Self)
    }
}

struct ParsedVisitor;

impl<'de> Visitor<'de> for ParsedVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::from(()))
    }
    fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::from(flag))
    }
    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::from(number))
    }
    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(i64::try_from(number).map_or_else(|_| Value::from(number), Value::from))
    }
    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::from(number))
    }
    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::from(text))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Parsed(item)) = seq.next_element()? {
            all.push(item);
        }
        Ok(Value::from_object(all))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Members::default();
        while let Some((Parsed(name), Parsed(value))) = map.next_entry()? {
            members.set(name, value);
        }
        Ok(Value::from_object(members))
    }
}
