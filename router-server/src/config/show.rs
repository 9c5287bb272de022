//! Settings for people: as a file, and what is missing.

use std::fmt::Write as _;

use clap::{Arg, ArgMatches, Command, CommandFactory};

use super::{Origin, Setting};
use crate::cli::{Cli, Urls};

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

/// The value in force as TOML.
pub(super) fn shown(arg: &Arg, matches: &ArgMatches) -> Option<String> {
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
