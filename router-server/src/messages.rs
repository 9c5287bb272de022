//! What a conversation and its tools must look like before a chat template sees them.

use serde_json::Value;

use crate::error::Error;
use crate::fields::kind_of;

/// Checks one message. The fault is the list's; where in it, the error says.
pub fn check_message(at: usize, message: &Value) -> Result<(), Error> {
    let fault = |field: &str, want: &str, got: &Value| {
        Err(Error::invalid("messages", format!("messages[{at}]{field} must be {want}: {}", kind_of(got))))
    };
    let Some(fields) = message.as_object() else { return fault("", "an object", message) };
    // One look at each field: a conversation has many messages, a message few fields.
    let (mut role, mut content, mut calls) = (&Value::Null, &Value::Null, &Value::Null);
    for (name, value) in fields {
        match name.as_str() {
            "role" => role = value,
            "content" => content = value,
            "tool_calls" => calls = value,
            _ => {}
        }
    }
    match role.as_str() {
        Some("system" | "developer" | "user" | "assistant" | "tool" | "function") => {}
        Some(role) => return Err(Error::invalid("messages", format!("messages[{at}] has an unknown role: {role}"))),
        None => return fault(".role", "a string", role),
    }
    match content {
        Value::String(_) => {}
        // Only a message of something else, such as calls, goes without content.
        Value::Null if role == "assistant" => {}
        Value::Array(parts) => {
            for part in parts {
                match (part["type"].as_str(), &part["text"]) {
                    (Some("text"), Value::String(_)) => {}
                    (Some("text"), other) => return fault(".content", "parts with a text", other),
                    (Some(kind), _) => {
                        let message = format!("messages[{at}].content: only parts of type text are supported: {kind}");
                        return Err(Error::Unsupported { message, param: "messages".into() });
                    }
                    (None, _) => return fault(".content", "parts with a type", &part["type"]),
                }
            }
        }
        other => return fault(".content", "a string or a list of parts", other),
    }
    match calls {
        Value::Null => Ok(()),
        // Some clients send the function's fields without the wrapper; templates know both.
        Value::Array(calls) => {
            let named = |call: &&Value| call["function"]["name"].is_string() || call["name"].is_string();
            match calls.iter().find(|call| !named(call)) {
                Some(call) => fault(".tool_calls", "calls of functions with a name", call),
                None => Ok(()),
            }
        }
        other => fault(".tool_calls", "a list", other),
    }
}

/// A tool is a function with a name.
pub fn check_tool(at: usize, tool: &Value) -> Result<(), Error> {
    if tool["type"] != "function" {
        let message = format!("tools[{at}]: only tools of type function are supported");
        return Err(Error::Unsupported { message, param: "tools".into() });
    }
    if !tool["function"]["name"].is_string() {
        return Err(Error::invalid("tools", format!("tools[{at}] must have a function with a name")));
    }
    Ok(())
}
