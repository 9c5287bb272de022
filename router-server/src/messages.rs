//! What a conversation and its tools must look like before a chat template sees them.

use minijinja::Value;
use minijinja::value::ValueKind;

use crate::error::Error;
use crate::json::{items, kind_of, member, members};

/// Most messages of a conversation.
const MOST_MESSAGES: usize = 65_536;

/// The conversation in a body's `messages`, checked: each message an object with a role.
pub fn check_messages(messages: &Value) -> Result<Vec<Value>, Error> {
    let messages = list("messages", messages)?;
    if messages.is_empty() || messages.len() > MOST_MESSAGES {
        let message = format!("there must be 1 to {MOST_MESSAGES} messages: {}", messages.len());
        return Err(Error::invalid("messages", message));
    }
    messages.iter().enumerate().try_for_each(|(at, message)| check_message(at, message))?;
    Ok(messages)
}

/// The tools in a body's `tools`, checked; none is as good as an empty list.
pub fn check_tools(tools: Value) -> Result<Option<Value>, Error> {
    let all = list("tools", &tools)?;
    all.iter().enumerate().try_for_each(|(at, tool)| check_tool(at, tool))?;
    Ok((!all.is_empty()).then_some(tools))
}

fn list(name: &str, value: &Value) -> Result<Vec<Value>, Error> {
    if value.kind() != ValueKind::Seq {
        return Err(Error::invalid(name, format!("{name} must be a list: {}", kind_of(Some(value)))));
    }
    Ok(items(value).collect())
}

/// Checks one message. The fault is the list's; where in it, the error says.
fn check_message(at: usize, message: &Value) -> Result<(), Error> {
    let fault = |field: &str, want: &str, got: Option<&Value>| {
        Err(Error::invalid("messages", format!("messages[{at}]{field} must be {want}: {}", kind_of(got))))
    };
    let Some(fields) = members(message) else { return fault("", "an object", Some(message)) };
    let kind = |value: Option<&Value>| value.map_or(ValueKind::None, Value::kind);
    let (role, content, calls) = (fields.get("role"), fields.get("content"), fields.get("tool_calls"));
    let assistant = match role.and_then(Value::as_str) {
        Some("assistant") => true,
        Some("system" | "developer" | "user" | "tool" | "function") => false,
        Some(role) => return Err(Error::invalid("messages", format!("messages[{at}] has an unknown role: {role}"))),
        None => return fault(".role", "a string", role),
    };
    match kind(content) {
        ValueKind::String => {}
        // Only a message of something else, such as calls, goes without content.
        ValueKind::None if assistant => {}
        ValueKind::Seq => {
            for part in content.into_iter().flat_map(items) {
                let (of, text) = (member(&part, "type"), member(&part, "text"));
                match of.and_then(Value::as_str) {
                    Some("text") if kind(text) == ValueKind::String => {}
                    Some("text") => return fault(".content", "parts with a text", text),
                    Some(of) => {
                        let message = format!("messages[{at}].content: only parts of type text are supported: {of}");
                        return Err(Error::Unsupported { message, param: "messages".into() });
                    }
                    None => return fault(".content", "parts with a type", of),
                }
            }
        }
        _ => return fault(".content", "a string or a list of parts", content),
    }
    match kind(calls) {
        ValueKind::None => Ok(()),
        ValueKind::Seq => {
            let is_name = |name: Option<&Value>| kind(name) == ValueKind::String;
            // Some clients send the function's fields without the wrapper; templates know both.
            let named = |call: &Value| {
                is_name(member(call, "function").and_then(|function| member(function, "name")))
                    || is_name(member(call, "name"))
            };
            match calls.into_iter().flat_map(items).find(|call| !named(call)) {
                Some(call) => fault(".tool_calls", "calls of functions with a name", Some(&call)),
                None => Ok(()),
            }
        }
        _ => fault(".tool_calls", "a list", calls),
    }
}

/// A tool is a function with a name.
fn check_tool(at: usize, tool: &Value) -> Result<(), Error> {
    if member(tool, "type").and_then(Value::as_str) != Some("function") {
        let message = format!("tools[{at}]: only tools of type function are supported");
        return Err(Error::Unsupported { message, param: "tools".into() });
    }
    if member(tool, "function").and_then(|function| member(function, "name")?.as_str()).is_none() {
        return Err(Error::invalid("tools", format!("tools[{at}] must have a function with a name")));
    }
    Ok(())
}
