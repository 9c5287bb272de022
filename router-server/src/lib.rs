//! The shell of `scls_router`: OpenAI-compatible HTTP and gRPC in front of slice workers.
//!
//! It converts, calls the core, and replies. Which worker is best and what runs when is `router-core`'s. A request
//! travels `http` or `grpc` → `pool` → `dispatch` (which owns the scheduler) → `link` → worker, and its tokens come
//! back through `dispatch` → `generation` → `http` or `grpc`.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

pub mod accept;
pub mod answer;
pub mod auth;
pub mod batch;
pub mod body;
pub mod boundaries;
pub mod calibrate;
pub mod cli;
pub mod completions;
pub mod config;
pub mod conversation;
pub mod convert;
mod deadline;
pub mod dispatch;
pub mod error;
pub mod eta;
mod fields;
pub mod fleet;
pub mod generation;
pub mod grpc;
pub mod health;
pub mod http;
pub mod json;
pub mod link;
pub mod messages;
pub mod meter;
pub mod metrics;
pub mod mock;
pub mod openapi;
pub mod output;
pub mod pieces;
pub mod pool;
pub mod prompt;
pub mod random;
pub mod request;
pub mod run;
pub mod sampling;
pub mod serve;
pub mod simulate;
pub mod stop;
pub mod template;
pub mod tokenize;
pub mod tokenizer;
pub mod up;

/// The contract's messages and services, generated.
#[allow(missing_docs, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("scls.v1");
}

/// Runs the command line, the first argument being the program's name. The binary and the Python wheel's console
/// script both end here.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::from(exit_code_from(args, None))
}

/// Like [`main_from`], for callers that need the number. `python` is the interpreter that the caller runs in: workers
/// of `up` run in it too, unless another is set.
pub fn exit_code_from(args: impl IntoIterator<Item = OsString>, python: Option<PathBuf>) -> u8 {
    let say = |error: &str| {
        let _ = writeln!(std::io::stderr(), "error: {error}");
    };
    let parsed = match config::parse(args, &std::env::vars_os().collect()) {
        Ok(parsed) => parsed,
        Err(config::Wrong::Flags(error)) => {
            // Help and version are "errors" with exit code 0, printed to stdout.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
        Err(config::Wrong::Values(problems)) => {
            for problem in &problems {
                say(problem);
            }
            return 2;
        }
    };
    match run::run(parsed, python) {
        Ok(()) => 0,
        Err(run::Failure::Usage(error)) => {
            say(&error);
            2
        }
        Err(run::Failure::Run(error)) => {
            say(&error);
            1
        }
        Err(run::Failure::Early(done, error)) => {
            let _ = std::io::stdout().write_all(done.as_bytes());
            say(&error);
            1
        }
    }
}
