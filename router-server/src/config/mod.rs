//! Settings: one value of each from flag, environment, file or default, in this order, and where it came from.
//!
//! What can be set, and how a value is checked, is clap's definition in `cli.rs` alone. This module finds for every
//! setting that no flag gives the text that the environment or the file has (`sources.rs`), checks each where it came
//! from, and hands them to clap as further flags: whichever way a value came, it ends in the same field through the same
//! parser.

mod names;
mod show;
mod sources;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgMatches, Args, Command, CommandFactory, FromArgMatches};

use crate::cli::{AllArgs, Cli};
pub use show::{missing, show};
use sources::Sources;

/// Environment variables.
pub type Environment = BTreeMap<OsString, OsString>;

/// The setting that says where the file is cannot be in the file.
const FILE: &str = "config";

/// A command line, with all that was set elsewhere.
pub struct Parsed {
    /// What to do, with checked values.
    pub cli: Cli,
    /// What can be set in a file, in the order of the help; those alone that the command has.
    pub settings: Vec<Setting>,
    /// The command line as it could be typed again.
    pub typed: String,
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
    let typed = typed(&args);
    // Whatever is wrong with the flags alone is said by the whole definition: it knows what is required.
    let flags = lenient(Cli::command()).try_get_matches_from(&args);
    let flags = flags.map_err(|error| Cli::command().try_get_matches_from(&args).err().unwrap_or(error));
    let flags = flags.map_err(Wrong::Flags)?;
    let (command, flags, path) = chosen(Cli::command(), &flags);

    let mut sources = Sources::new(environment);
    let mut warnings = Vec::new();
    if let Some(arg) = command.get_arguments().find(|arg| arg.get_id() == FILE) {
        sources.read_file(arg, flags);
        warnings = names::unknown_variables(environment);
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
        Setting { value: show::shown(arg, matches), origin, secret: is_secret(arg), key }
    });
    Ok(Parsed { settings: settings.collect(), cli, typed, warnings })
}

fn typed(args: &[OsString]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=@%+".contains(c);
    let quoted = |arg: &OsString| match arg.to_string_lossy() {
        arg if !arg.is_empty() && arg.chars().all(plain) => arg.into_owned(),
        arg => format!("'{}'", arg.replace('\'', r"'\''")),
    };
    let args = args.iter().skip(1).map(quoted);
    std::iter::once("scls-router".to_owned()).chain(args).collect::<Vec<_>>().join(" ")
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
