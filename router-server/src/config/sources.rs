//! Where values come from: flags, the environment, a file. Finds and checks them; knows no setting by name.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Map, Value};

use super::{Environment, FILE, Origin, definition_of_all, flag_with, is_secret, names, settings};

/// What is set outside of the command line.
pub(super) struct Sources<'a> {
    environment: &'a Environment,
    file: Option<File>,
    /// A message for each value that is wrong.
    pub(super) problems: Vec<String>,
}

struct File {
    path: PathBuf,
    /// By setting: the key as it is written, and its values.
    values: BTreeMap<String, (String, Vec<OsString>)>,
}

impl<'a> Sources<'a> {
    /// With no file yet.
    pub(super) fn new(environment: &'a Environment) -> Self {
        Self { environment, file: None, problems: Vec::new() }
    }

    /// The value in force of a setting, checked, unless it is the default's.
    pub(super) fn find(&mut self, arg: &Arg, flags: &ArgMatches) -> Option<(Origin, Vec<OsString>)> {
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
        // clap checks flags itself, but would print a secret that is wrong.
        if !matches!(origin, Origin::Flag(_)) || is_secret(arg) {
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

    /// Reads the file that the flag or the variable names, and checks all that is in it.
    pub(super) fn read_file(&mut self, arg: &Arg, flags: &ArgMatches) {
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
                None if value.is_object() => Err("a configuration has no sections".into()),
                None => Err(names::unknown_key(&id, settings(&definition).map(|arg| arg.get_id().as_str()))),
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
        // In full the error quotes the line, which may have a secret in it.
        toml::from_str(&text).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let (line, last) = (before.split('\n').count(), before.rsplit('\n').next().unwrap_or_default());
            format!("{shown}: line {line}, column {}: {}", last.chars().count() + 1, error.message())
        })
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
        Value::Array(all) if all.is_empty() => Err("it is empty".to_owned()),
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
            _ => match std::error::Error::source(&error).map(ToString::to_string) {
                None => "it is empty".to_owned(),
                Some(why) if why.starts_with("invalid digit") => "it is not an integer".to_owned(),
                Some(why) => why,
            },
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
