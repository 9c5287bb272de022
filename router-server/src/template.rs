//! Chat templates: messages to the text that a model was trained to continue.
//!
//! Renders like transformers does (`trim_blocks`, `lstrip_blocks`, its `tojson`, `raise_exception`, `strftime_now`),
//! in a sandbox without loaders and with a limit on work. Knows one template; does not know HTTP or tokens.

use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value, syntax::SyntaxConfig};
use serde_json::Value as Json;

/// Instructions a rendering may take. A conversation of a thousand long messages takes far less.
const FUEL: u64 = 5_000_000;
/// Most bytes of a template file: the largest published ones have some 20 KiB.
const MOST_BYTES: usize = 1 << 20;
const NAME: &str = "chat";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Vec<(String, Value)>,
    parts: Parts,
    arguments: Arguments,
}

/// What the template does with content that is a list of parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Parts {
    /// It loops over them.
    Understood,
    /// It expects a string: text parts are joined.
    Joined,
}

/// What the template does with the arguments of a tool call, which OpenAI clients send as a string of JSON.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Arguments {
    /// It tells strings from objects itself.
    Asis,
    /// It expects an object.
    Parsed,
}

/// Why a template cannot be used, or refuses a conversation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The file is no template, or needs what is not here.
    #[error("chat template: {0}")]
    Broken(String),
    /// The template raised an exception: the conversation is not of a form it takes.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
}

/// The message of `raise_exception`, told from errors of the template by its prefix.
const RAISED: &str = "raised: ";

impl ChatTemplate {
    /// Compiles a template. `config` is `tokenizer_config.json`, for the texts of special tokens.
    pub fn new(source: &str, config: &Json) -> Result<Self, TemplateError> {
        if source.len() > MOST_BYTES {
            return Err(TemplateError::Broken(format!("larger than {MOST_BYTES} bytes")));
        }
        let broken = |error: &JinjaError| TemplateError::Broken(error.to_string());
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| broken(&e))?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        environment.add_function("strftime_now", |format: String| strftime_now(&format));
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(|e| broken(&e))?;
        let special = special_tokens(config);
        let parts = if loops_over_content(source) { Parts::Understood } else { Parts::Joined };
        let arguments = if source.contains("arguments is string") { Arguments::Asis } else { Arguments::Parsed };
        Ok(Self { environment, special, parts, arguments })
    }

    /// The template of a model directory, if it has one: `chat_template.jinja`, else what `tokenizer_config.json` says.
    pub fn from_files(jinja: Option<&str>, config: &Json) -> Result<Option<Self>, TemplateError> {
        let named = |name: &str| {
            let all = config["chat_template"].as_array()?;
            all.iter().find(|entry| entry["name"] == name)?["template"].as_str()
        };
        let source = jinja.or_else(|| config["chat_template"].as_str()).or_else(|| named("default"));
        source.map(|source| Self::new(source, config)).transpose()
    }

    /// The prompt for a conversation, ready for the assistant's next message.
    pub fn render(&self, messages: &[Json], tools: Option<&Json>) -> Result<String, TemplateError> {
        let messages: Value = messages.iter().map(|message| self.message(message)).collect();
        let own = [
            ("messages".to_owned(), messages),
            ("tools".to_owned(), tools.map_or(Value::from(()), to_value)),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(true)),
        ];
        let context = Value::from_pairs(own.into_iter().chain(self.special.iter().cloned()));
        let template = self.environment.get_template(NAME).map_err(|e| TemplateError::Broken(e.to_string()))?;
        template.render(context).map_err(|error| {
            let detail = error.detail().unwrap_or_default();
            match detail.strip_prefix(RAISED) {
                Some(message) => TemplateError::Refused(message.to_owned()),
                None => TemplateError::Refused(error.to_string()),
            }
        })
    }

    /// A message in the form this template was written for. Long texts are copied once, into the template's values.
    fn message(&self, message: &Json) -> Value {
        let Some(fields) = message.as_object() else { return to_value(message) };
        let field = |name: &str, value: &Json| match value {
            Json::Array(parts) if name == "content" && self.parts == Parts::Joined => {
                let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
                Value::from(texts.join("\n"))
            }
            Json::Array(calls) if name == "tool_calls" && self.arguments == Arguments::Parsed => {
                calls.iter().map(|call| to_value(&with_arguments(call))).collect()
            }
            value => to_value(value),
        };
        let fields = fields.iter().map(|(name, value)| (Value::from(name.as_str()), field(name, value)));
        if fields.len() > FEW { Value::from_pairs(fields) } else { Value::from_object(Message(fields.collect())) }
    }
}

/// Fields that are found sooner by looking at each than by hashing a name.
const FEW: usize = 12;

/// A message with few fields, of which templates ask often.
#[derive(Debug)]
struct Message(Vec<(Value, Value)>);

impl Object for Message {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.0.iter().find(|(name, _)| name.as_str() == Some(key)).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(name, _)| name.clone()).collect())
    }
}

/// The call with its arguments as an object, if they are the text of one.
fn with_arguments(call: &Json) -> Json {
    let mut call = call.clone();
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(Ok(parsed @ Json::Object(_))) = arguments.as_str().map(serde_json::from_str)
    {
        *arguments = parsed;
    }
    call
}

/// `bos_token` and the like, which the configuration gives as a string or as an object with its content.
fn special_tokens(config: &Json) -> Vec<(String, Value)> {
    let entries = config.as_object().into_iter().flatten();
    let tokens = entries.filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"));
    tokens
        .filter_map(|(name, token)| {
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name.clone(), Value::from(text)))
        })
        .collect()
}

/// Whether some `for` in the template iterates over the content of a message.
fn loops_over_content(source: &str) -> bool {
    source.split("{%").skip(1).filter_map(|rest| rest.split("%}").next()).any(|tag| {
        let tag = tag.trim_matches(['-', '+', ' ', '\n', '\t']);
        let iterated = tag.strip_prefix("for ").and_then(|tag| tag.split_once(" in "));
        iterated.is_some_and(|(_, over)| over.contains("content") && !over.contains(".split("))
    })
}

/// Without `{% generation %}` and `{% endgeneration %}`, which mark the assistant's text for training and print nothing.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        match tag[2..end].trim_matches(['-', '+', ' ', '\n', '\t']) {
            // A comment leaves the whitespace control of the tag in force.
            "generation" | "endgeneration" => {
                let open = if tag.starts_with("{%-") { "{#-" } else { "{#" };
                let close = if tag.ends_with("-%}") { "-#}" } else { "#}" };
                out.push_str(open);
                out.push_str(close);
            }
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn strftime_now(format: &str) -> Result<Value, JinjaError> {
    // The filter of minijinja-contrib does the formatting; only the clock is ours.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut environment = Environment::new();
    environment.add_filter("datetimeformat", minijinja_contrib::filters::datetimeformat);
    let expression = environment.compile_expression("now|datetimeformat(format=format)")?;
    expression.eval(Value::from_pairs([("now", Value::from(now)), ("format", Value::from(format))]))
}

/// JSON to a template's value, order of keys kept.
fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, n) => Value::from(n.unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(all) => all.iter().map(to_value).collect(),
        Json::Object(all) => Value::from_pairs(all.iter().map(|(key, value)| (key.as_str(), to_value(value)))),
    }
}

/// `json.dumps(x, ensure_ascii=False, indent=indent)`: what transformers puts in the place of jinja2's filter, which
/// escapes for HTML.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, JinjaError> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Accepted for compatibility; false is what is done anyway.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(value, indent, 0, &mut out)?;
    Ok(out)
}

fn write_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), JinjaError> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => write_string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(items, ['[', ']'], indent, depth, out, |item, out| write_json(&item, indent, depth + 1, out))?;
        }
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            write_items(keys, ['{', '}'], indent, depth, out, |key, out| {
                write_string(&key.to_string(), out);
                out.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, out)
            })?;
        }
        _ => return Err(JinjaError::new(ErrorKind::InvalidOperation, "tojson: not a JSON value")),
    }
    Ok(())
}

fn write_items(
    items: Vec<Value>,
    [open, close]: [char; 2],
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
    mut write: impl FnMut(Value, &mut String) -> Result<(), JinjaError>,
) -> Result<(), JinjaError> {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    let empty = items.is_empty();
    for (at, item) in items.into_iter().enumerate() {
        if at > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(depth + 1, out);
        write(item, out)?;
    }
    if !empty {
        line(depth, out);
    }
    out.push(close);
    Ok(())
}

/// Python's `repr` of a number.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let text = f64::try_from(value.clone()).map_or_else(|_| value.to_string(), |float| format!("{float:?}"));
    // Rust says 1e16 and 1e-5 where Python says 1e+16 and 1e-05.
    match text.split_once('e') {
        None => text,
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
            format!("{mantissa}e{sign}{digits:0>2}")
        }
    }
}

fn write_string(text: &str, out: &mut String) {
    use std::fmt::Write;
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: &[Json], tools: Option<&Json>) -> Result<String, TemplateError> {
        let config =
            json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "add_bos_token": true});
        ChatTemplate::new(source, &config)?.render(messages, tools)
    }

    #[test]
    fn renders_like_transformers() {
        let chatml = "{% for message in messages %}\n  {% if loop.first %}\n{{ bos_token }}{% endif %}\n\
                      {{ '<|' + message['role'] + '|>' + message.content.strip() + eos_token }}\n{% endfor %}\n\
                      {% if add_generation_prompt %}\n<|assistant|>{% endif %}";
        let messages = [json!({"role": "user", "content": " hi "}), json!({"role": "assistant", "content": "<b>"})];
        let want = "<s><|user|>hi</s>\n<|assistant|><b></s>\n<|assistant|>";
        assert_eq!(render(chatml, &messages, None).expect("renders"), want);
    }

    #[test]
    fn tojson_is_pythons() {
        let tools = json!([{"b": 1, "a": [true, null, 1.5, "é<>&'\"\n\u{1}"], "c": {}, "d": 1e16, "e": 1e-5}]);
        let want = r#"[{"b": 1, "a": [true, null, 1.5, "é<>&'\"\n\u0001"], "c": {}, "d": 1e+16, "e": 1e-05}]"#;
        assert_eq!(render("{{ tools | tojson }}", &[], Some(&tools)).expect("renders"), want);
        let want = "[\n    {\n        \"a\": []\n    }\n]";
        let tools = json!([{"a": []}]);
        assert_eq!(render("{{ tools | tojson(indent=4) }}", &[], Some(&tools)).expect("renders"), want);
    }

    #[test]
    fn a_message_is_a_mapping() {
        let mut message = json!({"role": "user", "content": "a", "n": null});
        let source = "{% for m in messages %}{{ m is mapping }} {{ m | tojson }} {{ m['role'] }} {{ 'n' in m }} {{ 'x' in m }} \
                      {{ m.x is defined }} {{ m.get('x', 'no') }} {{ m | length }} {{ m.items() | list | length }} \
                      {{ m == messages[0] }} {% for key in m %}{{ key }};{% endfor %}\n{% endfor %}";
        let few = render(source, &[message.clone()], None).expect("renders");
        let json = r#"{"role": "user", "content": "a", "n": null}"#;
        assert_eq!(few, format!("True {json} user True False False no 3 3 True role;content;n;"));
        for i in 0..FEW {
            message[format!("x{i}")] = Json::Null;
        }
        let many = render(source, &[message], None).expect("renders");
        assert!(
            many.starts_with("True {\"role\"") && many.contains("user True False False no 15 15 True role;"),
            "{many}"
        );
    }

    #[test]
    fn exceptions_reach_the_client() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[], None).expect_err("raised");
        assert_eq!(error, TemplateError::Refused("roles must alternate".into()));
    }

    #[test]
    fn endless_work_ends() {
        let source = "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(render(source, &[], None).is_err());
    }

    #[test]
    fn parts_are_joined_for_templates_that_want_strings() {
        let messages =
            [json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})];
        let plain = "{% for m in messages %}{{ m.content }}{% endfor %}";
        assert_eq!(render(plain, &messages, None).expect("renders"), "a\nb");
        let looping = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}";
        assert_eq!(render(looping, &messages, None).expect("renders"), "[a][b]");
    }

    #[test]
    fn tool_arguments_become_objects_unless_the_template_looks() {
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}});
        let messages = [json!({"role": "assistant", "content": null, "tool_calls": [call]})];
        let start = "{% set a = messages[0].tool_calls[0].function.arguments %}";
        assert_eq!(render(&format!("{start}{{{{ a.x }}}}"), &messages, None).expect("renders"), "1");
        let looks = "{% set fn = messages[0].tool_calls[0].function %}{% if fn.arguments is string %}{{ fn.arguments }}{% endif %}";
        assert_eq!(render(looks, &messages, None).expect("renders"), "{\"x\":1}");
    }

    #[test]
    fn generation_marks_print_nothing() {
        let source = "a {%- generation -%} b {% endgeneration %}c";
        assert_eq!(render(source, &[], None).expect("renders"), "ab c");
    }

    #[test]
    fn strftime_now_formats() {
        let year = render("{{ strftime_now('%Y') }}", &[], None).expect("renders");
        assert!(year.len() == 4 && year.starts_with("20"), "{year}");
    }

    #[test]
    fn the_file_wins_over_the_configuration() {
        let config = json!({"chat_template": [{"name": "default", "template": "config"}]});
        let render = |jinja| {
            let template = ChatTemplate::from_files(jinja, &config).expect("compiles").expect("is there");
            template.render(&[], None).expect("renders")
        };
        assert_eq!(render(Some("file")), "file");
        assert_eq!(render(None), "config");
        assert!(ChatTemplate::from_files(None, &json!({})).expect("compiles").is_none());
    }
}
