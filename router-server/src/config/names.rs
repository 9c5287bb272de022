//! Names that nothing is known by, and what they may have been meant to be.

use clap::{Command, CommandFactory};

use super::Environment;
use crate::cli::Cli;

const PREFIX: &str = "SCLS_ROUTER_";
/// How like a known name an unknown one must be to be taken for it; clap's own measure for flags.
const ALIKE: f64 = 0.7;

/// What to say of a key that is no setting.
pub(super) fn unknown_key<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> String {
    match nearest(key, known) {
        (key, likeness) if likeness >= ALIKE => format!("unknown key\ndid you mean {key}?"),
        _ => "unknown key\n`scls-router config show` lists all".into(),
    }
}

/// Variables of our name that nothing reads. Others may share the prefix, so that they are no error.
pub(super) fn unknown_variables(environment: &Environment) -> Vec<String> {
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
