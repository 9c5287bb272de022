//! Chat templates: messages to the text that a model was trained to continue.
//!
//! Renders like transformers does (`trim_blocks`, `lstrip_blocks`, its `tojson`, `raise_exception`, `strftime_now`),
//! in a sandbox without loaders and with a limit on work. Knows one template; does not know HTTP or tokens.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value, syntax::SyntaxConfig};
use serde_json::Value as Json;

use crate::json::{Parsed, items, member, members};

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

    /// The prompt for a conversation, ready for the assistant's next message. Messages and tools are
    /// [`Parsed`] from JSON.
    pub fn render(&self, messages: &[Value], tools: Option<&Value>) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages.iter().map(|message| self.message(message)).collect();
        let own = [
            ("messages".to_owned(), Value::from_object(messages)),
            ("tools".to_owned(), tools.map_or(Value::from(()), Value::clone)),
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

    /// A message in the form this template was written for; almost always that is the message itself.
    fn message(&self, message: &Value) -> Value {
        let list = |name| member(message, name).and_then(items);
        let parts = list("content").filter(|_| self.parts == Parts::Joined);
        let calls = list("tool_calls").filter(|_| self.arguments == Arguments::Parsed);
        let content = parts.map(|parts| {
            let texts: Vec<&str> = parts.iter().filter_map(|part| member(part, "text")?.as_str()).collect();
            ("content", Value::from(texts.join("\n")))
        });
        let calls = calls.map(|calls| {
            let parsed = calls.iter().map(|call| with_arguments(call).unwrap_or_else(|| call.clone()));
            ("tool_calls", Value::from_object(parsed.collect::<Vec<Value>>()))
        });
        content.into_iter().chain(calls).fold(message.clone(), |message, (name, value)| with(&message, name, value))
    }
}

/// The object with another value for this name.
fn with(object: &Value, name: &str, value: Value) -> Value {
    let mut members = members(object).cloned().unwrap_or_default();
    members.set(Value::from(name), value);
    Value::from_object(members)
}

/// The call with its arguments as an object, if they are the text of one.
fn with_arguments(call: &Value) -> Option<Value> {
    let function = member(call, "function")?;
    let Parsed(arguments) = serde_json::from_str(member(function, "arguments")?.as_str()?).ok()?;
    members(&arguments)?;
    Some(with(call, "function", with(function, "arguments", arguments)))
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
    use std::ops::Range;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
        let config =
            json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "add_bos_token": true});
        ChatTemplate::new(source, &config)
    }

    fn parsed(json: &Json) -> Value {
        let Parsed(value) = serde_json::from_str(&json.to_string()).expect("JSON");
        value
    }

    fn render(source: &str, messages: &[Json], tools: Option<&Json>) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages.iter().map(parsed).collect();
        template(source)?.render(&messages, tools.map(parsed).as_ref())
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
        for i in 0..12 {
            message[format!("x{i}")] = Json::Null;
        }
        let many = render(source, &[message], None).expect("renders");
        assert!(
            many.starts_with("True {\"role\"") && many.contains("user True False False no 15 15 True role;"),
            "{many}"
        );
    }

    /// What templates do with messages and tools, one each.
    const USES: [&str; 38] = [
        "{{ m.role }}{{ m['content'] }}{{ m.x1 }}{{ m['x1'] }}{{ m[1] }}{{ m[none] }}",
        "{{ m.content.strip() }}{{ m.content | trim | upper }}{{ m['content'][:3] }}",
        "{{ 'tool_calls' in m }}{{ 'x1' in m }}{{ 1 in m }}{{ 'x1' not in m }}",
        "{{ m is mapping }}{{ m is iterable }}{{ m is sequence }}{{ m is string }}{{ m is none }}",
        "{{ m.content is string }}{{ m.content is defined }}{{ m.content is none }}{{ m.no is defined }}",
        "{{ m | tojson }}",
        "{{ m | tojson(indent=2) }}",
        "{{ m }}{{ m | string }}",
        "{{ m | length }}{{ m | count }}{% if m.x1 %}yes{% endif %}{{ not m }}",
        "{{ m.items() | list }}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}",
        "{{ m.keys() | list }}{{ m.values() | list }}{{ m.get('x1') }}{{ m.get('no', 5) }}",
        "{% for k, v in m | items %}{{ k }}={{ v }};{% endfor %}{{ m | items | tojson }}",
        "{{ m | dictsort }}{{ m | dictsort(by='value') }}",
        "{% for k in m %}{{ k }}:{{ m[k] }};{% endfor %}{{ m | list }}{{ m | first }}",
        "{{ m | reverse | list }}{{ m | last }}",
        "{{ m == messages[0] }}{{ m != messages[-1] }}{{ m in messages }}{{ m < messages[0] }}",
        "{{ dict(m, own=1) | tojson }}{{ dict(m).role }}",
        "{{ [m, m] | unique | list | length }}{{ messages | unique | list | length }}",
        "{{ {'role': 'user', 'content': 'a'} == m }}{{ [m] == [messages[0]] }}",
        "{{ m | pprint }}",
        "{{ m | urlencode }}",
        "{{ m.append(1) }}",
        "{{ m.content.split('a')[0] }}{{ m.content.startswith('a') }}{{ m.content ~ m.role }}",
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{{ p }}{% endfor %}{% endif %}",
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}{{ c | tojson }}{{ c }}{% endfor %}",
        "{% for c in m.tool_calls %}{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}{% endfor %}",
        "{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}{{ v }}{% endfor %}{% endfor %}",
        "{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}{{ v }}{% endfor %}{% endfor %}",
        "{{ messages | map(attribute='role') | join(',') }}{{ messages | map(attribute='x1') | list }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list }}{{ messages | rejectattr('content') | list }}",
        "{{ messages | groupby('role') | tojson }}",
        "{{ messages | sort(attribute='role') | tojson }}{{ messages | max(attribute='role') }}",
        "{{ messages[1:] }}{{ messages[-1]['role'] }}{{ messages | last }}{{ messages | length }}{{ messages | sort | list }}",
        "{% set ns = namespace(m=m) %}{{ ns.m.role }}{% set n = m %}{{ n.x1.a.b }}",
        "{{ m.x1 + 1 }}{{ -m.x1 }}{{ m.x1 // 2 }}{{ m.x1 | int }}{{ m.x1 | abs }}{{ m.x1 * 2 }}",
        "{{ m.x1 }}{{ m.x1 is number }}{{ m.x1 is integer }}{{ m.x1 is float }}{{ m.x1 == 1 }}{{ m.x1 | tojson }}",
        "{% if loop.first %}{{ tools | tojson }}{{ tools }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% endif %}",
        "{% if loop.first and tools %}{{ tools | map(attribute='function') | list }}{{ tools[0] == tools[-1] }}{% endif %}",
    ];

    /// As values were made before they were parsed straight into a template's: by way of JSON values, into its own maps.
    fn by_way_of_json(json: &Json) -> Value {
        match json {
            Json::Null => Value::from(()),
            Json::Bool(b) => Value::from(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
                (Some(n), _, _) => Value::from(n),
                (_, Some(n), _) => Value::from(n),
                (_, _, n) => Value::from(n.expect("one of them")),
            },
            Json::String(s) => Value::from(s.as_str()),
            Json::Array(all) => all.iter().map(by_way_of_json).collect(),
            Json::Object(all) => {
                Value::from_pairs(all.iter().map(|(key, value)| (key.as_str(), by_way_of_json(value))))
            }
        }
    }

    /// A message in the template's form, made from JSON.
    fn in_its_form(template: &ChatTemplate, mut message: Json) -> Json {
        if template.parts == Parts::Joined
            && let Some(parts) = message["content"].as_array()
        {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
            message["content"] = json!(texts.join("\n"));
        }
        if template.arguments == Arguments::Parsed
            && let Some(calls) = message.get_mut("tool_calls").and_then(Json::as_array_mut)
        {
            for arguments in calls.iter_mut().filter_map(|call| call.pointer_mut("/function/arguments")) {
                if let Some(Ok(parsed @ Json::Object(_))) = arguments.as_str().map(serde_json::from_str) {
                    *arguments = parsed;
                }
            }
        }
        message
    }

    fn any_json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            prop_oneof![any::<i64>(), -3..3i64].prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            prop_oneof![any::<f64>(), Just(1.0), Just(-0.0), Just(1e20)].prop_map(Json::from),
            ".{0,6}|a{30}".prop_map(Json::from),
        ];
        leaf.prop_recursive(3, 24, 16, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
                proptest::collection::vec(("x[0-9]|[ab]|role", inner), 0..16)
                    .prop_map(|all| Json::Object(all.into_iter().collect())),
            ]
        })
    }

    fn any_message() -> impl Strategy<Value = Json> {
        let text =
            prop_oneof![Just("a".to_owned()), ".{0,40}", Just("  long enough to be no small string\n".to_owned())];
        let parts =
            proptest::collection::vec(text.clone().prop_map(|text| json!({"type": "text", "text": text})), 0..3);
        let content = prop_oneof![text.prop_map(Json::from), parts.prop_map(Json::from), Just(Json::Null)];
        let arguments = prop_oneof![
            any_json(),
            any_json().prop_map(|json| Json::from(json.to_string())),
            proptest::collection::vec(("[a-c]", any_json()), 0..3)
                .prop_map(|all| Json::from(Json::Object(all.into_iter().collect()).to_string())),
        ];
        let call = (arguments, any_json()).prop_map(
            |(arguments, id)| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}),
        );
        let calls = proptest::collection::vec(prop_oneof![3 => call, 1 => any_json()], 0..3);
        let role = prop_oneof![Just("system"), Just("user"), Just("assistant"), Just("tool")];
        let more = proptest::collection::vec(("x[0-9a-f]", any_json()), 0..20);
        (role, content, proptest::option::of(calls), more).prop_map(|(role, content, calls, more)| {
            let mut message = json!({"role": role, "content": content});
            let calls = calls.map(|calls| ("tool_calls".to_owned(), Json::from(calls)));
            for (name, value) in calls.into_iter().chain(more) {
                message[name] = value;
            }
            message
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn parsed_messages_read_as_those_made_by_way_of_json(
            messages in proptest::collection::vec(any_message(), 1..4),
            tools in proptest::option::of(proptest::collection::vec(any_json(), 0..3)),
        ) {
            let tools = tools.map(Json::from);
            let parsed_messages: Vec<Value> = messages.iter().map(parsed).collect();
            for body in USES {
                let template = template(&format!("{{% for m in messages %}}{body}\n{{% endfor %}}")).expect("compiles");
                let plain = messages.iter().map(|message| by_way_of_json(&in_its_form(&template, message.clone())));
                let plain = plain.collect::<Vec<Value>>();
                let want = template.render(&plain, tools.as_ref().map(by_way_of_json).as_ref());
                let got = template.render(&parsed_messages, tools.as_ref().map(parsed).as_ref());
                prop_assert_eq!(got, want, "{}", body);
            }
        }
    }

    #[test]
    fn the_last_of_equal_names_counts() {
        let render = |text: &str| {
            let Parsed(message) = serde_json::from_str(text).expect("JSON");
            template("{{ messages[0] | tojson }}").expect("compiles").render(&[message], None).expect("renders")
        };
        assert_eq!(render(r#"{"a": 1, "b": 2, "a": 3}"#), r#"{"a": 3, "b": 2}"#);
        let members = |values: Range<u32>| {
            let members: Vec<String> = values.map(|i| format!(r#""x{}": {i}"#, i % 20)).collect();
            format!("{{{}}}", members.join(", "))
        };
        assert_eq!(render(&members(0..40)), members(20..40));
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
