//! The command line: each flag with its environment twin, default, check and help, once. What a configuration file may
//! hold follows from it (`config/`), so a new setting is one field of [`ServeArgs`] or [`UpArgs`]: it needs `long` and
//! `env`, a bool `num_args = 0..=1` as `log_json` has it, and a secret `hide_env_values`.

use std::path::PathBuf;
use std::time::Duration;

use axum::http::Uri;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};
use router_core::{Config, Mode, PolicyName, Pooled};
use tracing_subscriber::EnvFilter;

use crate::config::Setting;
use crate::mock::MockArgs;
use crate::pool::PoolConfig;
use crate::simulate::{DoctorArgs, SimulateArgs};

/// Product routing and slice-level scheduling of LLM inference.
///
/// A setting comes from its flag, else its environment variable (an empty one counts as not set), else the configuration
/// file, else its default. Exit codes: 0 done, 1 failed, 2 a wrong flag or setting.
#[derive(Debug, Parser)]
#[command(name = "scls-router", bin_name = "scls-router", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve over workers that run already.
    #[command(args_override_self = true)]
    Serve {
        /// The workers.
        #[command(flatten)]
        workers: UrlArgs,
        /// All else.
        #[command(flatten)]
        serve: ServeArgs,
    },
    /// Start workers on this machine and serve over them.
    #[command(args_override_self = true)]
    Up {
        /// The workers.
        #[command(flatten)]
        up: UpArgs,
        /// All else.
        #[command(flatten)]
        serve: ServeArgs,
    },
    /// Measure what iterations cost on this machine, for `up --cost-model`.
    #[command(args_override_self = true)]
    Calibrate(CalibrateArgs),
    /// Run requests through modelled workers in virtual time: plan a fleet, compare policies.
    #[command(args_override_self = true)]
    Simulate(Box<SimulateArgs>),
    /// Say in which minutes of a trace requests would crowd on few workers that hold their prefix.
    #[command(args_override_self = true)]
    Doctor(DoctorArgs),
    /// Be a worker without a model, for tests.
    #[command(args_override_self = true)]
    MockWorker {
        /// How it is.
        #[command(flatten)]
        mock: MockArgs,
        /// error, warn, info, debug or trace.
        #[arg(long, env = "SCLS_ROUTER_LOG_LEVEL", default_value = "info", value_parser = log_filter)]
        log_level: String,
    },
    /// Ask a running router or worker whether it is ready: exit code 0 if it is, else 1.
    #[command(args_override_self = true)]
    Health(HealthArgs),
    /// Show or check the settings of `serve` and `up`, without serving.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the version.
    Version,
}

/// What to do with the settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the settings in force, as a configuration file; secrets are left out.
    #[command(args_override_self = true)]
    Show {
        /// Say where each value comes from.
        #[arg(long)]
        origin: bool,
        /// The settings.
        #[command(flatten)]
        all: AllArgs,
    },
    /// Say whether all settings are valid, and what `serve` and `up` still need.
    #[command(args_override_self = true)]
    Check {
        /// The settings.
        #[command(flatten)]
        all: AllArgs,
    },
}

/// Where a configuration file is.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// Configuration file, .toml or .yaml: keys are the long flags, like `log_json` or `log-json`.
    #[arg(long, env = "SCLS_ROUTER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Where the router listens for HTTP.
#[derive(Debug, Args)]
pub struct HttpArgs {
    /// Address of the HTTP and gRPC listeners.
    #[arg(long, help_heading = "Listeners", env = "SCLS_ROUTER_HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// HTTP port; 0 picks a free one, as for the other ports.
    #[arg(long, help_heading = "Listeners", env = "SCLS_ROUTER_PORT", default_value_t = 30000)]
    pub port: u16,
}

/// Flags of `health`.
#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Whom to ask: `http://host:port` a router, `grpc://host:port` a router or a worker; if not given, the router
    /// with the same settings on this machine.
    #[arg(long, value_parser = worker_url)]
    pub url: Option<String>,
    /// Longest to wait for the answer.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout_secs: u64,
    /// Settings may be in a file.
    #[command(flatten)]
    pub file: FileArgs,
    /// Where that router listens.
    #[command(flatten)]
    pub http: HttpArgs,
}

/// Flags of `serve` alone.
#[derive(Debug, Args)]
pub struct UrlArgs {
    /// Workers: `grpc://host:port` or `http://host:port`, separated by spaces or commas.
    #[arg(long, help_heading = "Workers", env = "SCLS_ROUTER_WORKER_URLS", num_args = 1.., required = true, value_parser = worker_urls)]
    pub worker_urls: Vec<Urls>,
}

/// Flags of `up` alone.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Directory of the model.
    #[arg(long, alias = "model-path", help_heading = "Workers", env = "SCLS_ROUTER_MODEL")]
    pub model: PathBuf,
    /// How many workers.
    #[arg(long, help_heading = "Workers", env = "SCLS_ROUTER_WORKERS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// The Python that has `scls_worker`; if not given, the one that runs this program, else `python3`.
    #[arg(long, help_heading = "Workers", env = "SCLS_ROUTER_PYTHON")]
    pub python: Option<PathBuf>,
    /// What iterations cost on this machine, as `calibrate` wrote it; if not given, each worker takes a short look at its
    /// start.
    #[arg(long, help_heading = "Workers", env = "SCLS_ROUTER_COST_MODEL", value_name = "FILE")]
    pub cost_model: Option<PathBuf>,
    /// More arguments for the workers, separated by spaces.
    #[arg(
        long,
        help_heading = "Workers",
        env = "SCLS_ROUTER_WORKER_ARGS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub worker_args: String,
}

/// Flags of `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Directory of the model.
    #[arg(long, alias = "model-path", env = "SCLS_ROUTER_MODEL")]
    pub model: PathBuf,
    /// Where the figures go.
    #[arg(long, default_value = "cost-model.json", value_name = "FILE")]
    pub out: PathBuf,
    /// auto, cpu or cuda; the worker's own default if not given.
    #[arg(long)]
    pub device: Option<String>,
    /// The Python that has `scls_worker`; if not given, the one that runs this program, else `python3`.
    #[arg(long, env = "SCLS_ROUTER_PYTHON")]
    pub python: Option<PathBuf>,
    /// More arguments for the worker, separated by spaces: those that `up` is to give it too.
    #[arg(long, env = "SCLS_ROUTER_WORKER_ARGS", default_value = "", allow_hyphen_values = true)]
    pub worker_args: String,
}

/// Flags of everything that serves.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Settings may be in a file.
    #[command(flatten)]
    pub file: FileArgs,
    /// The HTTP listener.
    #[command(flatten)]
    pub http: HttpArgs,
    /// gRPC port.
    #[arg(long, help_heading = "Listeners", env = "SCLS_ROUTER_GRPC_PORT", default_value_t = 30001)]
    pub grpc_port: u16,
    /// Port of metrics and administration, on loopback.
    #[arg(long, help_heading = "Listeners", env = "SCLS_ROUTER_ADMIN_PORT", default_value_t = 29000)]
    pub admin_port: u16,
    /// How a worker is chosen.
    #[arg(long, help_heading = "Scheduling", env = "SCLS_ROUTER_POLICY", value_enum, default_value = PolicyName::default().as_str())]
    policy: Policy,
    /// How rows become batches.
    #[arg(long, help_heading = "Scheduling", env = "SCLS_ROUTER_SCHEDULER", value_enum, default_value_t = Scheduler::Slice)]
    scheduler: Scheduler,
    /// S: most iterations of a slice, with `--scheduler scls` alone; without it the paper's. All else is measured.
    #[arg(long, help_heading = "Scheduling", env = "SCLS_ROUTER_SLICE_LEN", value_parser = clap::value_parser!(u32).range(1..))]
    slice_len: Option<u32>,
    /// Seed of the `random` policy.
    #[arg(long, help_heading = "Scheduling", env = "SCLS_ROUTER_SEED", default_value_t = 0)]
    seed: u64,
    /// Most requests at once; more are answered 429.
    #[arg(long, help_heading = "Limits", env = "SCLS_ROUTER_MAX_CONCURRENT_REQUESTS", default_value_t = 4096, value_parser = at_least_one)]
    max_concurrent_requests: usize,
    /// Longest a request may take.
    #[arg(long, help_heading = "Limits", env = "SCLS_ROUTER_REQUEST_TIMEOUT_SECS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    request_timeout_secs: u64,
    /// Longest a request may wait to be begun; past that it is answered 408. Without it the time of the whole request.
    #[arg(long, help_heading = "Limits", env = "SCLS_ROUTER_QUEUE_TIMEOUT_SECS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    queue_timeout_secs: Option<u64>,
    /// Largest HTTP body in bytes.
    #[arg(long, help_heading = "Limits", env = "SCLS_ROUTER_MAX_PAYLOAD_SIZE", default_value_t = 8 << 20, value_parser = at_least_one)]
    pub max_payload_size: usize,
    /// Folded into the names of all KV blocks; routers with different keys share no cache. A secret: itself,
    /// `env:NAME` or `file:PATH`, in a configuration file one of the latter.
    #[arg(long, help_heading = "Secrets", env = "SCLS_ROUTER_FLEET_KEY", default_value = "", hide_env_values = true)]
    fleet_key: String,
    /// Keys of which clients must send one as `authorization: Bearer KEY`, separated by commas. A
    /// secret as above; other users of the machine can read a command line.
    #[arg(long, help_heading = "Secrets", env = "SCLS_ROUTER_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// error, warn, info, debug or trace, or a filter like `router_server=debug`.
    #[arg(long, help_heading = "Log", env = "SCLS_ROUTER_LOG_LEVEL", default_value = "info", value_parser = log_filter)]
    pub log_level: String,
    /// Logs as JSON lines.
    #[arg(long, help_heading = "Log", env = "SCLS_ROUTER_LOG_JSON", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", default_value_t = false, value_parser = BoolishValueParser::new())]
    pub log_json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Policy {
    /// New prefill tokens times batch size; the smallest wins.
    Product,
    /// The product, times what the prefill would cost the requests that arrive meanwhile; the smallest wins.
    ProductAnticipating,
    /// The time of one slice there times batch size; the smallest wins.
    ProductTime,
    /// One after the other.
    RoundRobin,
    /// By a seeded draw.
    Random,
    /// The fewest unfinished rows.
    LeastRequests,
}

impl Policy {
    fn core(self) -> (PolicyName, &'static str) {
        match self {
            Self::Product => (PolicyName::Product, "product"),
            Self::ProductAnticipating => (PolicyName::ProductAnticipating, "product_anticipating"),
            Self::ProductTime => (PolicyName::ProductTime, "product_time"),
            Self::RoundRobin => (PolicyName::RoundRobin, "round_robin"),
            Self::Random => (PolicyName::Random, "random"),
            Self::LeastRequests => (PolicyName::LeastRequests, "least_requests"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scheduler {
    /// By slices: rows stay where their KV is, a slice is cut where joining it is worth it.
    Slice,
    /// The paper's (arXiv 2406.13511): a pool, batches by length, KV dropped after each slice.
    Scls,
    /// By sequences: a batch runs until its last row ends.
    Sls,
    /// By iterations: a plan for each.
    Ils,
}

impl Scheduler {
    fn core(self) -> Mode {
        match self {
            Self::Slice => Mode::Slice,
            Self::Scls => Mode::Pooled(Pooled::scls()),
            Self::Sls => Mode::Pooled(Pooled::sls()),
            Self::Ils => Mode::Ils,
        }
    }
}

/// All that a configuration file may hold: the flags of `serve` and of `up`, none of them required.
#[derive(Debug)]
pub struct AllArgs {
    /// What both have.
    pub serve: ServeArgs,
}

impl Args for AllArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        // "For update" is what clap calls a command line that may leave out what is required.
        let command = UpArgs::augment_args_for_update(UrlArgs::augment_args_for_update(command));
        ServeArgs::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for AllArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self { serve: ServeArgs::from_arg_matches(matches)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.serve.update_from_arg_matches(matches)
    }
}

/// Addresses of workers as one argument gives them.
#[derive(Clone, Debug)]
pub struct Urls(pub Vec<String>);

fn worker_urls(text: &str) -> Result<Urls, String> {
    let urls = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|url| !url.is_empty());
    match urls.map(worker_url).collect::<Result<Vec<_>, _>>()? {
        urls if urls.is_empty() => Err("no worker is named".into()),
        urls => Ok(Urls(urls)),
    }
}

fn worker_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("grpc://").or_else(|| text.strip_prefix("http://"));
    let rest = rest.ok_or_else(|| format!("an address is grpc://host:port or http://host:port: {text}"))?;
    let wrong = |what: &str| format!("{what}: {text}\nan address is grpc://host:port");
    let uri: Uri = format!("http://{rest}").parse().map_err(|error| wrong(&format!("no address, {error}")))?;
    let host = uri.host().unwrap_or_default();
    if host.is_empty() || host == "[]" || uri.authority().is_some_and(|all| all.as_str().contains('@')) {
        return Err(wrong("not a host and a port"));
    }
    if uri.path() != "/" || uri.query().is_some() || text.contains('#') {
        return Err(wrong("it has a path"));
    }
    match uri.port_u16() {
        Some(1..) => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err(wrong("the port is missing")),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("not a number: {error}")),
    }
}

/// A level, or directives with a level each. A bare word that is no level would be read as the one part of the program
/// that is to be logged, and be silent about all others.
fn log_filter(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    let mut words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    let wrong = words.find(|word| !word.contains(['=', '[']) && !is_level(word));
    if wrong.is_some() || text.trim().is_empty() {
        let what = wrong.unwrap_or("nothing");
        return Err(format!(
            "not a level: {what}\nit is error, warn, info, debug or trace, or like router_server=debug"
        ));
    }
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

impl ServeArgs {
    /// What no single value shows: an error names the settings that do not go together, and who set them.
    pub fn check(&self, settings: &[Setting]) -> Result<(), String> {
        if self.http.port > 0 && self.http.port == self.grpc_port {
            return Err(format!("port and grpc_port are the same: {}", self.grpc_port));
        }
        let mode = self.scheduler.core();
        if self.slice_len.is_some() && self.scheduler != Scheduler::Scls {
            let by = |key: &str| settings.iter().find(|setting| setting.key == key).map(|setting| &setting.origin);
            let by = |key| by(key).map_or_else(String::new, |origin| format!(" ({origin})"));
            let (ours, theirs) = (by("slice_len"), by("scheduler"));
            return Err(format!(
                "slice_len{ours} does not go with scheduler {mode}{theirs}\nscheduler scls alone has a slice length that can be set"
            ));
        }
        Ok(())
    }

    /// The values that all pools are made with.
    pub fn pool_config(&self) -> PoolConfig {
        let (policy, name) = self.policy.core();
        PoolConfig {
            scheduler: Config {
                policy,
                mode: self.scheduler.core(),
                slice_len: self.slice_len,
                seed: self.seed,
                max_rows: self.max_concurrent_requests,
            },
            policy: name,
            timeout: Duration::from_secs(self.request_timeout_secs),
            queue_timeout: self.queue_timeout_secs.map(Duration::from_secs),
            fleet_key: self.fleet_key.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn worker_urls_are_checked() {
        for right in ["grpc://127.0.0.1:5", "http://host:5/", "grpc://[::1]:5"] {
            worker_url(right).expect(right);
        }
        for wrong in [
            "127.0.0.1:5",
            "grpc://host",
            "https://host:5",
            "grpc://:5",
            "grpc://host:70000",
            "grpc://host:0",
            "grpc://host:5/path",
            "grpc://host:5?a",
            "grpc://me@host:5",
            "grpc://ho\u{7f}st:5",
            "grpc://",
        ] {
            worker_url(wrong).expect_err(wrong);
        }
    }

    #[test]
    fn filters_and_limits_are_checked() {
        for right in ["info", "WARN", "router_server=debug", "info,hyper=off"] {
            log_filter(right).expect(right);
        }
        for wrong in ["loud", "", "info,loud", "router_server=loud"] {
            log_filter(wrong).expect_err(wrong);
        }
        let parse = |flag: &str| Cli::try_parse_from(["x", "serve", "--worker-urls", "grpc://a:1", flag, "0"]);
        parse("--max-concurrent-requests").expect_err("zero");
        parse("--max-payload-size").expect_err("zero");
        parse("--port").expect("a free one");
    }

    #[test]
    fn urls_come_by_space_or_comma() {
        let parse = |args: &[&str]| match Cli::try_parse_from(args).expect("valid").command {
            Command::Serve { workers, .. } => workers.worker_urls.iter().map(|urls| urls.0.len()).sum(),
            _ => 0,
        };
        assert_eq!(parse(&["x", "serve", "--worker-urls", "grpc://a:1", "grpc://b:2", "--port", "0"]), 2);
        assert_eq!(parse(&["x", "serve", "--worker-urls", "grpc://a:1,grpc://b:2"]), 2);
        assert_eq!(parse(&["x", "serve", "--worker-urls", " grpc://a:1  grpc://b:2, grpc://c:3 "]), 3);
        Cli::try_parse_from(["x", "serve"]).expect_err("no workers");
        Cli::try_parse_from(["x", "serve", "--worker-urls", " , "]).expect_err("no workers");
    }
}
