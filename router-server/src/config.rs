//! Settings: one value of each from flag, environment, file or default, in this order, and where it came from.
//!
//! What can be set, and how a value is checked, is clap's definition in `cli.rs` alone. This file finds for every setting
//! that no flag gives the text that the environment or the file has, checks each where it came from, and hands them to
//! clap as further flags: whichever way a value came, it ends in the same field through the same parser.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, CommandFactory, FromArgMatches};
use serde_json::{Map, Value};

use crate::cli::{AllArgs, Cli, Urls};

/// Environment variables.
pub type Environment = BTreeMap<OsString, OsString>;

const PREFIX: &str = "SCLS_ROUTER_";
/// The setting that says where the file is cannot be in the file.
const FILE: &str = "config";
/// How like a known name an unknown one must be to be taken for it; clap's own measure for flags.
const ALIKE: f64 = 0.7;

/// A command line, with all that was set elsewhere.
pub struct Parsed {
    /// What to do, with checked values.
    pub cli: Cli,
    /// What can be set in a file, in the order of the help; those alone that the command has.
    pub settings: Vec<Setting>,
    /// What looks like a mistake and is none for sure.
    pub warnings: Vec<String>,
}

/// Why there is nothing to run.
pub enum Wrong {
    /// The flags; or it is help that was asked for.
    Flags(clap::Error),
    /// The file or the environment: a message for each value.
    Values(Vec<String>),
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag, with its dashes.
    Flag(String),
    /// An environment variable.
    Env(String),
    /// A file, and the key as it is written there.
    File(PathBuf, String),
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(out, "flag {flag}"),
            Self::Env(name) => write!(out, "env {name}"),
            Self::File(path, key) => write!(out, "{}: {key}", path.display()),
            Self::Default => write!(out, "default"),
        }
    }
}

/// A setting in force.
#[derive(Debug)]
pub struct Setting {
    /// Its key in a file.
    pub key: String,
    /// What it is, as TOML; none if it is not set.
    pub value: Option<String>,
    /// Who set it.
    pub origin: Origin,
    /// What it is must not be shown.
    pub secret: bool,
}

/// Reads a command line, its first argument being the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>, environment: &Environment) -> Result<Parsed, Wrong> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    // Whatever is wrong with the flags alone is said by the whole definition: it knows what is required.
    let flags = lenient(Cli::command()).try_get_matches_from(&args);
    let flags = flags.map_err(|error| Cli::command().try_get_matches_from(&args).err().unwrap_or(error));
    let flags = flags.map_err(Wrong::Flags)?;
    let (command, flags, path) = chosen(Cli::command(), &flags);

    let mut sources = Sources { environment, file: None, problems: Vec::new() };
    let mut warnings = Vec::new();
    if let Some(arg) = command.get_arguments().find(|arg| arg.get_id() == FILE) {
        sources.read_file(arg, flags);
        warnings = unknown_variables(environment);
    }
    let mut origins = BTreeMap::new();
    for arg in command.get_arguments().filter(|arg| arg.get_long().is_some() && arg.get_id() != FILE) {
        let Some((origin, values)) = sources.find(arg, flags) else { continue };
        // A flag that is given stays as it is, but a secret may be said to lie elsewhere.
        if !matches!(origin, Origin::Flag(_)) || is_secret(arg) {
            args.extend(values.iter().map(|value| flag_with(arg, value)));
        }
        origins.insert(arg.get_id().to_string(), origin);
    }
    if !sources.problems.is_empty() {
        return Err(Wrong::Values(sources.problems));
    }

    let mut definition = without_environment(Cli::command());
    let matches = definition.try_get_matches_from_mut(&args);
    let matches = matches.map_err(|error| Wrong::Flags(with_plain_usage(error, &path, &mut definition)))?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| Wrong::Flags(error.format(&mut definition)))?;
    let (_, matches, _) = chosen(Cli::command(), &matches);
    let known = definition_of_all();
    let settings = settings(&known).filter(|arg| command.get_arguments().any(|ours| ours.get_id() == arg.get_id()));
    let settings = settings.map(|arg| {
        let key = arg.get_id().to_string();
        let origin = origins.remove(&key).unwrap_or(Origin::Default);
        Setting { value: shown(arg, matches), origin, secret: is_secret(arg), key }
    });
    Ok(Parsed { settings: settings.collect(), cli, warnings })
}

/// The settings as a file that sets them; each with its origin, if wanted.
pub fn show(settings: &[Setting], with_origin: bool) -> String {
    let mut out = String::new();
    for Setting { key, value, origin, secret } in settings {
        let line = match value {
            Some(value) if !secret => format!("{key} = {value}"),
            // A comment, so that the file does not set it to stars.
            Some(_) if *origin != Origin::Default => format!("# {key} = \"***\""),
            _ => {
                let _ = writeln!(out, "# {key} is not set");
                continue;
            }
        };
        let origin = match origin {
            _ if !with_origin => String::new(),
            Origin::File(path, _) => format!("  # {}", path.display()),
            origin => format!("  # {origin}"),
        };
        // Writing to a String cannot fail. A path may hold anything, a comment only one line.
        let _ = writeln!(out, "{line}{}", origin.replace(char::is_control, "?"));
    }
    out
}

/// What a command still needs of these settings before it can run.
pub fn missing(command: &str, settings: &[Setting]) -> Vec<String> {
    let definition = Cli::command();
    let command = definition.find_subcommand(command).into_iter();
    let required = command.flat_map(Command::get_arguments).filter(|arg| arg.is_required_set());
    let is_set = |id: &str| settings.iter().any(|setting| setting.key == id && setting.origin != Origin::Default);
    required.map(|arg| arg.get_id().to_string()).filter(|id| !is_set(id)).collect()
}

fn lenient(command: Command) -> Command {
    without_environment(command).mut_args(|arg| arg.required(false)).mut_subcommands(lenient)
}

fn without_environment(command: Command) -> Command {
    command.mut_args(|arg| arg.env(Resettable::Reset)).mut_subcommands(without_environment)
}

/// The innermost command that was chosen, what was given to it, and the names that lead to it.
fn chosen(mut command: Command, mut matches: &ArgMatches) -> (Command, &ArgMatches, Vec<&str>) {
    let mut path = Vec::new();
    while let Some((name, inner)) = matches.subcommand() {
        // What was parsed by a definition has its commands.
        command = command.find_subcommand(name).cloned().unwrap_or_default();
        matches = inner;
        path.push(name);
    }
    (command, matches, path)
}

/// clap's usage lists the flags that were given: here also those that nobody typed.
fn with_plain_usage(mut error: clap::Error, path: &[&str], mut command: &mut Command) -> clap::Error {
    for name in path {
        let Some(inner) = command.find_subcommand_mut(name) else { return error };
        command = inner;
    }
    if error.kind() == ErrorKind::MissingRequiredArgument {
        error.insert(ContextKind::Usage, ContextValue::StyledStr(command.render_usage()));
    }
    error
}

fn definition_of_all() -> Command {
    AllArgs::augment_args(Command::new("settings"))
}

fn settings(definition: &Command) -> impl Iterator<Item = &Arg> {
    definition.get_arguments().filter(|arg| arg.get_id() != FILE)
}

/// What may not be printed in help may not be shown elsewhere.
fn is_secret(arg: &Arg) -> bool {
    arg.is_hide_env_values_set()
}

fn flag_with(arg: &Arg, value: &OsStr) -> OsString {
    let mut flag = OsString::from(format!("--{}=", arg.get_long().unwrap_or_default()));
    flag.push(value);
    flag
}

/// What is set outside of the command line.
struct Sources<'a> {
    environment: &'a Environment,
    file: Option<File>,
    problems: Vec<String>,
}

struct File {
    path: PathBuf,
    /// By setting: the key as it is written, and its values.
    values: BTreeMap<String, (String, Vec<OsString>)>,
}

impl Sources<'_> {
    /// The value in force of a setting, checked, unless it is the default's.
    fn find(&mut self, arg: &Arg, flags: &ArgMatches) -> Option<(Origin, Vec<OsString>)> {
        let id = arg.get_id().as_str();
        let (origin, mut values) = if flags.value_source(id) == Some(ValueSource::CommandLine) {
            let flag = format!("--{}", arg.get_long().unwrap_or_default());
            (Origin::Flag(flag), flags.get_raw(id).into_iter().flatten().map(OsStr::to_owned).collect())
        } else if let Some((name, value)) = self.variable(arg) {
            (Origin::Env(name), vec![value])
        } else {
            let file = self.file.as_ref()?;
            let (key, values) = file.values.get(id)?;
            // Checked when the file was read, as all that is in it.
            return Some((Origin::File(file.path.clone(), key.clone()), values.clone()));
        };
        if is_secret(arg) {
            for value in &mut values {
                match self.secret(value) {
                    Ok(found) => *value = found.unwrap_or_else(|| std::mem::take(value)),
                    Err(why) => self.problems.push(format!("{origin}: {why}")),
                }
            }
        }
        if !matches!(origin, Origin::Flag(_)) {
            self.problems.extend(check(arg, &values).err().map(|why| format!("{origin}: {why}")));
        }
        Some((origin, values))
    }

    fn variable(&self, arg: &Arg) -> Option<(String, OsString)> {
        let name = arg.get_env()?;
        let value = self.environment.get(name).filter(|value| !value.is_empty())?;
        Some((name.to_string_lossy().into_owned(), value.clone()))
    }

    /// What `env:NAME` or `file:PATH` names; none for a text that is the secret itself.
    fn secret(&self, text: &OsStr) -> Result<Option<OsString>, String> {
        let Some(text) = text.to_str() else { return Ok(None) };
        if let Some(name) = text.strip_prefix("env:") {
            let value = self.environment.get(OsStr::new(name)).filter(|value| !value.is_empty());
            value.cloned().map(Some).ok_or_else(|| format!("the environment variable is not set: {name}"))
        } else if let Some(path) = text.strip_prefix("file:") {
            let secret = std::fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
            let secret = secret.trim_end_matches(['\r', '\n']);
            if secret.is_empty() { Err(format!("the file is empty: {path}")) } else { Ok(Some(secret.into())) }
        } else {
            Ok(None)
        }
    }

    fn read_file(&mut self, arg: &Arg, flags: &ArgMatches) {
        let flag = flags.get_raw(FILE).and_then(|mut values| values.next_back()).map(OsStr::to_owned);
        let Some(path) = flag.or_else(|| Some(self.variable(arg)?.1)).map(PathBuf::from) else { return };
        let entries = match read(&path) {
            Ok(entries) => entries,
            Err(why) => return self.problems.push(why),
        };
        let definition = definition_of_all();
        let mut values = BTreeMap::new();
        for (key, value) in entries {
            let origin = Origin::File(path.clone(), key.clone());
            let id = key.replace('-', "_");
            let checked = match settings(&definition).find(|arg| arg.get_id() == id.as_str()) {
                _ if values.contains_key(&id) => Err("it is set twice".into()),
                Some(arg) => self.checked(arg, &value),
                None => Err(unknown_key(&definition, &id, &value)),
            };
            match checked {
                Ok(found) => drop(values.insert(id, (key, found))),
                Err(why) => self.problems.push(format!("{origin}: {why}")),
            }
        }
        self.file = Some(File { path, values });
    }

    fn checked(&self, arg: &Arg, value: &Value) -> Result<Vec<OsString>, String> {
        let mut values = texts(arg, value)?;
        if is_secret(arg) {
            for value in &mut values {
                let found = self.secret(value)?;
                *value = found.ok_or("a secret is not written into the file: use \"env:NAME\" or \"file:PATH\"")?;
            }
        }
        check(arg, &values)?;
        Ok(values)
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, String> {
    let shown = path.display();
    let is = |end: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(end));
    if !is("toml") && !is("yaml") && !is("yml") {
        return Err(format!("{shown}: a configuration file ends in .toml, .yaml or .yml"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{shown}: cannot read it: {error}"))?;
    if is("toml") {
        toml::from_str(&text).map_err(|error| format!("{shown}: {}", error.to_string().trim_end()))
    } else {
        // An empty document is null. YAML's own mapping refuses a key that is there twice, JSON's would take the last.
        let entries: Option<yaml_serde::Mapping> =
            yaml_serde::from_str(&text).map_err(|error| format!("{shown}: {error}"))?;
        match entries.map(serde_json::to_value).transpose() {
            Ok(Some(Value::Object(entries))) => Ok(entries),
            Ok(_) => Ok(Map::new()),
            Err(error) => Err(format!("{shown}: {error}")),
        }
    }
}

/// The values of an entry as flags have them.
fn texts(arg: &Arg, value: &Value) -> Result<Vec<OsString>, String> {
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.into()),
        Value::Bool(_) | Value::Number(_) => Ok(value.to_string().into()),
        Value::Null => Err("it has no value".to_owned()),
        Value::Array(_) | Value::Object(_) => Err("it is one value, not a list or a section".to_owned()),
    };
    match value {
        Value::Array(all) if matches!(arg.get_action(), ArgAction::Append) => all.iter().map(text).collect(),
        one => Ok(vec![text(one)?]),
    }
}

/// Whether values are what a setting takes; says why not.
fn check(arg: &Arg, values: &[OsString]) -> Result<(), String> {
    let probe = Arg::new("value").long("value").action(ArgAction::Append).value_parser(arg.get_value_parser().clone());
    for value in values {
        let command = Command::new("check").no_binary_name(true).arg(probe.clone());
        let Err(error) = command.try_get_matches_from([flag_with(&probe, value)]) else { continue };
        let why = match (error.kind(), error.get(ContextKind::ValidValue)) {
            (ErrorKind::InvalidValue, Some(ContextValue::Strings(valid))) if !valid.is_empty() => {
                format!("it is one of {}", valid.join(", "))
            }
            _ => std::error::Error::source(&error).map_or_else(|| "it is empty".to_owned(), ToString::to_string),
        };
        let shown = if is_secret(arg) { "***".into() } else { value.to_string_lossy() };
        let mut text = format!("invalid value '{shown}': {why}");
        if shown.starts_with("tcp://") {
            text.push_str("\nKubernetes sets such variables for a Service of this name: set enableServiceLinks: false");
        }
        return Err(text);
    }
    Ok(())
}

fn unknown_key(definition: &Command, id: &str, value: &Value) -> String {
    if value.is_object() {
        return "a configuration has no sections".into();
    }
    match nearest(id, settings(definition).map(|arg| arg.get_id().as_str())) {
        (key, likeness) if likeness >= ALIKE => format!("unknown key\ndid you mean {key}?"),
        _ => "unknown key\n`scls-router config show` lists all".into(),
    }
}

/// Variables of our name that nothing reads. Others may share the prefix, so that they are no error.
fn unknown_variables(environment: &Environment) -> Vec<String> {
    fn known(command: &Command) -> Vec<String> {
        let own = command.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned()));
        own.chain(command.get_subcommands().flat_map(known)).collect()
    }
    let known = known(&Cli::command());
    let ours = environment.keys().filter_map(|name| name.to_str()).filter(|name| name.starts_with(PREFIX));
    let unknown = ours.filter(|name| !known.iter().any(|known| known == name));
    let warning = |name: &str| {
        let bare = |name| str::trim_start_matches(name, PREFIX);
        let (nearest, _) = nearest(bare(name), known.iter().map(|known| bare(known)));
        format!("unknown environment variable {name}; the nearest that is read is {PREFIX}{nearest}")
    };
    unknown.map(warning).collect()
}

/// The name most like this one, and how like, up to 1.
fn nearest<'a>(name: &str, all: impl Iterator<Item = &'a str>) -> (&'a str, f64) {
    let all = all.map(|one| (one, strsim::jaro_winkler(name, one)));
    all.max_by(|one, other| one.1.total_cmp(&other.1)).unwrap_or(("", 0.0))
}

/// The value in force as TOML.
fn shown(arg: &Arg, matches: &ArgMatches) -> Option<String> {
    let id = arg.get_id().as_str();
    if let Ok(urls) = matches.try_get_many::<Urls>(id) {
        let urls: Vec<toml::Value> = urls?.flat_map(|urls| urls.0.clone()).map(toml::Value::String).collect();
        return Some(toml::Value::Array(urls).to_string());
    }
    if let Ok(on) = matches.try_get_one::<bool>(id) {
        return on.map(ToString::to_string);
    }
    let text = matches.get_raw(id)?.next_back()?.to_string_lossy().into_owned();
    let is_number = text.parse::<i64>().is_ok_and(|number| number.to_string() == text);
    Some(if is_number { text } else { toml::Value::String(text).to_string() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cli;

    /// A file that is gone after the test.
    struct Written(PathBuf);

    impl Written {
        fn new(name: &str, text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("scls-config-{}-{name}", std::process::id()));
            std::fs::write(&path, text).expect("a temporary file");
            Self(path)
        }

        fn path(&self) -> &str {
            self.0.to_str().expect("UTF-8")
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    fn read_line(line: &[&str], env: &[(&str, &str)]) -> Result<Parsed, Vec<String>> {
        let args = ["scls-router"].iter().chain(line).map(OsString::from);
        parse(args, &environment(env)).map_err(|wrong| match wrong {
            Wrong::Flags(error) => vec![error.to_string()],
            Wrong::Values(problems) => problems,
        })
    }

    fn setting<'a>(parsed: &'a Parsed, key: &str) -> (&'a str, Origin) {
        let setting = parsed.settings.iter().find(|setting| setting.key == key).expect(key);
        (setting.value.as_deref().unwrap_or("none"), setting.origin.clone())
    }

    fn problems(line: &[&str], env: &[(&str, &str)]) -> Vec<String> {
        read_line(line, env).err().expect("it is wrong")
    }

    #[test]
    fn the_nearest_source_wins() {
        let written = [
            Written::new(
                "order.toml",
                "port = 3\nslice-len = 3\nlog_json = true\nworker_urls = ['grpc://f:1', 'grpc://g:2']",
            ),
            Written::new("order.yaml", "port: 3\nslice-len: 3\nlog_json: true\nworker_urls: [grpc://f:1, grpc://g:2]"),
        ];
        let flag = |flag: &str| Origin::Flag(flag.into());
        let env = |name: &str| Origin::Env(name.into());
        for file in &written {
            let from_file = |key: &str| Origin::File(file.0.clone(), key.into());
            let config = ["--config", file.path()];
            let port_env = ("SCLS_ROUTER_PORT", "2");
            let json_env = ("SCLS_ROUTER_LOG_JSON", "no");
            let both = "[\"grpc://f:1\", \"grpc://g:2\"]";
            let urls_env = ("SCLS_ROUTER_WORKER_URLS", "grpc://e:1");
            for (flags, vars, key, value, origin) in [
                (&["--port", "1"][..], &[port_env][..], "port", "1", flag("--port")),
                (&[], &[port_env], "port", "2", env("SCLS_ROUTER_PORT")),
                (&[], &[("SCLS_ROUTER_PORT", "")], "port", "3", from_file("port")),
                (&[], &[], "port", "3", from_file("port")),
                (&[], &[], "slice_len", "3", from_file("slice-len")),
                (&[], &[], "seed", "0", Origin::Default),
                (&["--log-json=false"], &[], "log_json", "false", flag("--log-json")),
                (&["--log-json"], &[json_env], "log_json", "true", flag("--log-json")),
                (&[], &[json_env], "log_json", "false", env("SCLS_ROUTER_LOG_JSON")),
                (
                    &["--worker-urls", "grpc://a:1"],
                    &[urls_env],
                    "worker_urls",
                    "[\"grpc://a:1\"]",
                    flag("--worker-urls"),
                ),
                (&[], &[urls_env], "worker_urls", "[\"grpc://e:1\"]", env("SCLS_ROUTER_WORKER_URLS")),
                (&[], &[], "worker_urls", both, from_file("worker_urls")),
            ] {
                let line = [&["serve"], &config[..], flags].concat();
                let parsed = read_line(&line, vars).unwrap_or_else(|why| panic!("{line:?} {vars:?}: {why:?}"));
                assert_eq!(setting(&parsed, key), (value, origin), "{line:?} {vars:?}");
            }
            // The struct that serves has what is shown.
            let parsed = read_line(&[&["serve"], &config[..]].concat(), &[port_env]).expect("valid");
            let cli::Command::Serve { workers, serve } = parsed.cli.command else { panic!("not serve") };
            assert_eq!((serve.http.port, serve.log_json, workers.worker_urls.len()), (2, true, 2));
            // The file's place may come from the environment, and one file serves `up` and `health` too.
            let place = ("SCLS_ROUTER_CONFIG", file.path());
            let parsed = read_line(&["up", "--model", "m"], &[place]).expect("valid");
            assert_eq!(setting(&parsed, "port"), ("3", from_file("port")));
            let cli::Command::Health(health) = read_line(&["health"], &[place]).expect("valid").cli.command else {
                panic!("not health")
            };
            assert_eq!(health.http.port, 3);
        }
    }

    #[test]
    fn an_error_says_where_the_value_came_from() {
        for (name, text, expected) in [
            ("a.toml", "port = 70000", "port: invalid value '70000': 70000 is not in 0..=65535"),
            ("b.toml", "port = -1", "port: invalid value '-1': -1 is not in 0..=65535"),
            ("c.toml", "port = [1]", "port: it is one value, not a list or a section"),
            ("d.yaml", "port:", "port: it has no value"),
            ("e.toml", "policy = 'best'", "policy: invalid value 'best': it is one of product, round_robin"),
            ("f.toml", "slice_length = 1", "slice_length: unknown key\ndid you mean slice_len?"),
            ("g.toml", "xyz = 1", "xyz: unknown key\n`scls-router config show` lists all"),
            ("h.toml", "config = 'other.toml'", "config: unknown key"),
            ("i.toml", "[serve]\nport = 1", "serve: a configuration has no sections"),
            ("j.toml", "slice_len = 1\nslice-len = 2", "slice-len: it is set twice"),
            ("k.toml", "fleet_key = 'abc'", "fleet_key: a secret is not written into the file"),
            ("l.toml", "fleet_key = 'env:NO_SUCH'", "fleet_key: the environment variable is not set: NO_SUCH"),
            ("m.toml", "worker_urls = ['grpc://a']", "worker_urls: invalid value 'grpc://a': the port is missing"),
            ("n.toml", "model = ''", "model: invalid value '': it is empty"),
            ("o.toml", "port = ", "TOML parse error at line 1"),
            ("p.yml", "port: [", "did not find"),
            ("q.yaml", "a", "invalid type"),
            ("r.yaml", "port: 1\nport: 2", "duplicate entry with key \"port\""),
            ("s.yaml", "port: !x 1", "port: it is one value"),
            ("t.yaml", "port: .nan", "port: it has no value"),
            ("u.yaml", "[1]: 2", "key must be a string"),
            ("v.json", "{}", "a configuration file ends in .toml, .yaml or .yml"),
        ] {
            let file = Written::new(name, text);
            // What a flag overrides is checked too: the file is wrong whatever the flags are.
            let found = problems(&["config", "check", "--config", file.path(), "--port", "1"], &[]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].starts_with(&format!("{}: {expected}", file.path())), "{text}: {found:?}");
        }
        let found = problems(&["config", "check", "--config", "/no/such.toml"], &[]);
        assert!(found[0].starts_with("/no/such.toml: cannot read it: "), "{found:?}");

        for (name, value, expected) in [
            ("SCLS_ROUTER_PORT", "x", "env SCLS_ROUTER_PORT: invalid value 'x': invalid digit"),
            ("SCLS_ROUTER_WORKERS", "0", "env SCLS_ROUTER_WORKERS: invalid value '0': 0 is not in 1..=1024"),
            ("SCLS_ROUTER_FLEET_KEY", "file:/no/such", "env SCLS_ROUTER_FLEET_KEY: cannot read /no/such: "),
        ] {
            let found = problems(&["config", "check"], &[(name, value)]);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
        }
        let service_link = problems(&["config", "check"], &[("SCLS_ROUTER_PORT", "tcp://10.0.0.1:80")]);
        assert!(service_link[0].contains("enableServiceLinks"), "{service_link:?}");
        // All at once.
        let file = Written::new("all.toml", "port = 'x'\nslice_len = 0");
        assert_eq!(problems(&["serve", "--config", file.path()], &[("SCLS_ROUTER_SEED", "x")]).len(), 3);
    }

    #[test]
    fn a_text_means_the_same_wherever_it_comes_from() {
        let texts = [
            "0",
            "1",
            "-1",
            "16",
            "65536",
            "1.5",
            " 1",
            "1e3",
            "99999999999999999999",
            "true",
            "No",
            "on",
            "abc",
            "random",
            "info",
            "grpc://a:1",
            "http://a:1,grpc://b:2",
            "grpc://a",
            "--x y",
            "é\t\"\\",
            "[1]",
            "~",
            "# x",
            "'",
        ];
        let definition = definition_of_all();
        let mut valid = 0;
        for arg in settings(&definition).filter(|arg| !is_secret(arg)) {
            let (key, variable) = (arg.get_id().as_str(), arg.get_env().and_then(OsStr::to_str).expect("it has one"));
            for text in texts {
                let quoted = toml::Value::String(text.into()).to_string();
                let toml = Written::new("text.toml", &format!("{key} = {quoted}"));
                let yaml = Written::new("text.yaml", &format!("{key}: {}", Value::from(text)));
                let flag = format!("--{}={text}", key.replace('_', "-"));
                let found = [
                    read_line(&["config", "show", &flag], &[]),
                    read_line(&["config", "show"], &[(variable, text)]),
                    read_line(&["config", "show", "--config", toml.path()], &[]),
                    read_line(&["config", "show", "--config", yaml.path()], &[]),
                ];
                let found = found.map(|parsed| parsed.ok().map(|parsed| setting(&parsed, key).0.to_owned()));
                assert!(found.iter().all(|value| *value == found[0]), "{key} {text:?}: {found:?}");
                valid += usize::from(found[0].is_some());
            }
        }
        assert!(valid > 100, "{valid}");
    }

    proptest! {
        /// Every error is one for people, with the file's name: nothing panics, nothing is taken silently.
        #[test]
        fn whatever_a_file_holds_is_answered(text in "(port|seed|log_json|- |: |= |[\\[\\]{}&*!|>'\"%@`,#?\n\t \\\\]|[a-z0-9.-]|<<|\\PC){0,30}") {
            for name in ["any.toml", "any.yaml"] {
                let file = Written::new(name, &text);
                if let Err(problems) = read_line(&["config", "check", "--config", file.path()], &[]) {
                    prop_assert!(!problems.is_empty());
                    prop_assert!(problems.iter().all(|problem| problem.starts_with(file.path())), "{:?}", problems);
                }
            }
        }
    }

    #[test]
    fn secrets_are_found_and_not_shown() {
        let secret = Written::new("secret", "from a file\n");
        let named = format!("file:{}", secret.path());
        let by_file = Written::new("secret.toml", &format!("fleet_key = '{named}'"));
        let by_env = Written::new("secret-env.toml", "fleet_key = 'env:THE_KEY'");
        let the_key = ("THE_KEY", "from a variable");
        for (flags, vars, expected) in [
            (&["--fleet-key", "itself"][..], &[][..], "itself"),
            (&["--fleet-key", &named], &[], "from a file"),
            (&["--fleet-key", "env:THE_KEY"], &[the_key], "from a variable"),
            (&[], &[("SCLS_ROUTER_FLEET_KEY", named.as_str())], "from a file"),
            (&["--config", by_file.path()], &[], "from a file"),
            (&["--config", by_env.path()], &[the_key], "from a variable"),
            (&[], &[], ""),
        ] {
            let line = [&["serve", "--worker-urls", "grpc://a:1"], flags].concat();
            let parsed = read_line(&line, vars).unwrap_or_else(|why| panic!("{line:?}: {why:?}"));
            let cli::Command::Serve { serve, .. } = &parsed.cli.command else { panic!("not serve") };
            assert_eq!(serve.pool_config().fleet_key, expected);
            let shown = show(&parsed.settings, true);
            let line = shown.lines().find(|line| line.contains("fleet_key")).expect("it is a setting");
            let stars = if expected.is_empty() { "# fleet_key is not set" } else { "# fleet_key = \"***\"  # " };
            assert!(line.starts_with(stars), "{line}");
            assert!(expected.is_empty() || !shown.contains(expected), "{shown}");
        }
    }

    #[test]
    fn what_is_shown_sets_the_same() {
        let vars = [("SCLS_ROUTER_SEED", "18446744073709551615"), ("SCLS_ROUTER_WORKER_ARGS", "--x \"a\\b\"\u{7f}")];
        let line = ["config", "show", "--worker-urls", "grpc://a:1,grpc://b:2", "--model", "007", "--log-json"];
        let first = read_line(&line, &vars).expect("valid");
        let first = [show(&first.settings, false), show(&first.settings, true)];
        for text in &first {
            let file = Written::new("shown.toml", text);
            let again = read_line(&["config", "show", "--config", file.path()], &[]).expect("valid");
            assert_eq!(show(&again.settings, false), first[0]);
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let check = |flags: &[&str]| {
            let parsed = read_line(&[&["config", "check"], flags].concat(), &[]).expect("valid");
            (missing("serve", &parsed.settings), missing("up", &parsed.settings))
        };
        assert_eq!(check(&[]), (vec!["worker_urls".to_owned()], vec!["model".to_owned()]));
        assert_eq!(check(&["--worker-urls", "grpc://a:1"]), (vec![], vec!["model".to_owned()]));
        let usage = problems(&["serve"], &[("SCLS_ROUTER_PORT", "1")]).concat();
        assert!(usage.contains("serve [OPTIONS] --worker-urls <WORKER_URLS>...\n"), "{usage}");
    }

    #[test]
    fn unknown_variables_name_the_nearest() {
        let vars = [("SCLS_ROUTER_SLICE_LENGTH", "5"), ("SCLS_ROUTER_SEED", "1"), ("SCLS_WORKER_X", "1")];
        let warnings = read_line(&["config", "check"], &vars).expect("valid").warnings;
        let expected = "unknown environment variable SCLS_ROUTER_SLICE_LENGTH; the nearest that is read is \
                        SCLS_ROUTER_SLICE_LEN";
        assert_eq!(warnings, [expected]);
        assert!(read_line(&["version"], &vars).expect("valid").warnings.is_empty());
    }

    /// The rules of `cli.rs`, without which a setting could not come from a file.
    #[test]
    fn every_setting_has_a_variable_and_takes_a_value() {
        let definition = definition_of_all();
        for arg in settings(&definition) {
            let id = arg.get_id().as_str();
            assert_eq!(arg.get_long(), Some(id.replace('_', "-").as_str()));
            assert_eq!(arg.get_env(), Some(OsStr::new(&format!("{PREFIX}{}", id.to_uppercase()))));
            assert!(matches!(arg.get_action(), ArgAction::Set | ArgAction::Append), "{id} takes no value");
            assert!(arg.get_help_heading().is_some(), "{id} is in no group of the help");
        }
    }
}
