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
    Ok(messages.to_vec())
}

/// The tools in a body's `tools`, checked; none is as good as an empty list.
pub fn check_tools(tools: Value) -> Result<Option<Value>, Error> {
    let all = list("tools", &tools)?;
    all.iter().enumerate().try_for_each(|(at, tool)| check_tool(at, tool))?;
    let none = all.is_empty();
    Ok((!none).then_some(tools))
}

fn list<'a>(name: &str, value: &'a Value) -> Result<&'a [Value], Error> {
    let wrong = || Error::invalid(name, format!("{name} must be a list: {}", kind_of(value)));
    items(value).ok_or_else(wrong)
}

/// Checks one message. The fault is the list's; where in it, the error says.
fn check_message(at: usize, message: &Value) -> Result<(), Error> {
    let fault = |field: &str, want: &str, got: &Value| {
        Err(Error::invalid("messages", format!("messages[{at}]{field} must be {want}: {}", kind_of(got))))
    };
    let Some(fields) = members(message) else { return fault("", "an object", message) };
    // One look at each field: a conversation has many messages, a message few fields.
    let (mut role, mut content, mut calls) = (&Value::UNDEFINED, &Value::UNDEFINED, &Value::UNDEFINED);
    for (name, value) in fields.iter() {
        match name.as_str() {
            Some("role") => role = value,
            Some("content") => content = value,
            Some("tool_calls") => calls = value,
            _ => {}
        }
    }
    let assistant = match role.as_str() {
        Some("assistant") => true,
        Some("system" | "developer" | "user" | "tool" | "function") => false,
        Some(role) => return Err(Error::invalid("messages", format!("messages[{at}] has an unknown role: {role}"))),
        None => return fault(".role", "a string", role),
    };
    match content.kind() {
        ValueKind::String => {}
        // Only a message of something else, such as calls, goes without content.
        ValueKind::Undefined | ValueKind::None if assistant => {}
        _ => match items(content) {
            Some(parts) => parts.iter().try_for_each(|part| {
                let field = |name| member(part, name).unwrap_or(&Value::UNDEFINED);
                let (kind, text) = (field("type"), field("text"));
                match kind.as_str() {
                    Some("text") if text.kind() == ValueKind::String => Ok(()),
                    Some("text") => fault(".content", "parts with a text", text),
                    Some(kind) => {
                        let message = format!("messages[{at}].content: only parts of type text are supported: {kind}");
                        Err(Error::Unsupported { message, param: "messages".into() })
                    }
                    None => fault(".content", "parts with a type", kind),
                }
            })?,
            None => return fault(".content", "a string or a list of parts", content),
        },
    }
    if matches!(calls.kind(), ValueKind::Undefined | ValueKind::None) {
        return Ok(());
    }
    let Some(calls) = items(calls) else { return fault(".tool_calls", "a list", calls) };
    // Some clients send the function's fields without the wrapper; templates know both.
    let named = |call: &&Value| has_name(member(call, "function")) || has_name(Some(call));
    match calls.iter().find(|call| !named(call)) {
        Some(call) => fault(".tool_calls", "calls of functions with a name", call),
        None => Ok(()),
    }
}

fn has_name(function: Option<&Value>) -> bool {
    function.and_then(|function| member(function, "name")).is_some_and(|name| name.kind() == ValueKind::String)
}

/// A tool is a function with a name.
fn check_tool(at: usize, tool: &Value) -> Result<(), Error> {
    if member(tool, "type").and_then(Value::as_str) != Some("function") {
        let message = format!("tools[{at}]: only tools of type function are supported");
        return Err(Error::Unsupported { message, param: "tools".into() });
    }
    if !has_name(member(tool, "function")) {
        return Err(Error::invalid("tools", format!("tools[{at}] must have a function with a name")));
    }
    Ok(())
}
