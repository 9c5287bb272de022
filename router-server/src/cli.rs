//! The command line: flags with their environment twins, turned once into checked values.

use std::path::PathBuf;
use std::time::Duration;

use axum::http::Uri;
use clap::builder::BoolishValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use router_core::{Config, PolicyName};
use tracing_subscriber::EnvFilter;

use crate::mock::MockArgs;
use crate::pool::PoolConfig;

/// Product routing and slice-level scheduling of LLM inference.
#[derive(Debug, Parser)]
#[command(name = "scls-router", version, arg_required_else_help = true)]
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
        /// Workers: `grpc://host:port` or `http://host:port`, separated by spaces or commas.
        #[arg(long, env = "SCLS_ROUTER_WORKER_URLS", num_args = 1.., required = true, value_parser = worker_urls)]
        worker_urls: Vec<Urls>,
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
    /// Print the version.
    Version,
}

/// Flags of `up` alone.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Directory of the model.
    #[arg(long, alias = "model-path", env = "SCLS_ROUTER_MODEL")]
    pub model: PathBuf,
    /// How many workers.
    #[arg(long, env = "SCLS_ROUTER_WORKERS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// The Python that has `scls_worker`.
    #[arg(long, env = "SCLS_ROUTER_PYTHON", default_value = "python3")]
    pub python: PathBuf,
    /// More arguments for the workers, separated by spaces.
    #[arg(long, env = "SCLS_ROUTER_WORKER_ARGS", default_value = "", allow_hyphen_values = true)]
    pub worker_args: String,
}

/// Flags of everything that serves.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address of the HTTP and gRPC listeners.
    #[arg(long, env = "SCLS_ROUTER_HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// HTTP port; 0 picks a free one, as for the other ports.
    #[arg(long, env = "SCLS_ROUTER_PORT", default_value_t = 30000)]
    pub port: u16,
    /// gRPC port.
    #[arg(long, env = "SCLS_ROUTER_GRPC_PORT", default_value_t = 30001)]
    pub grpc_port: u16,
    /// Port of metrics and administration, on loopback.
    #[arg(long, env = "SCLS_ROUTER_ADMIN_PORT", default_value_t = 29000)]
    pub admin_port: u16,
    /// How a worker is chosen.
    #[arg(long, env = "SCLS_ROUTER_POLICY", value_enum, default_value_t = Policy::Product)]
    policy: Policy,
    /// S: most iterations of a slice.
    #[arg(long, env = "SCLS_ROUTER_SLICE_LEN", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    slice_len: u32,
    /// Seed of the `random` policy.
    #[arg(long, env = "SCLS_ROUTER_SEED", default_value_t = 0)]
    seed: u64,
    /// Most requests at once; more are answered 429.
    #[arg(long, env = "SCLS_ROUTER_MAX_CONCURRENT_REQUESTS", default_value_t = 4096, value_parser = at_least_one)]
    max_concurrent_requests: usize,
    /// Longest a request may take.
    #[arg(long, env = "SCLS_ROUTER_REQUEST_TIMEOUT_SECS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    request_timeout_secs: u64,
    /// Longest a request may wait to be begun; past that it is answered 408. Without it the time of the whole request.
    #[arg(long, env = "SCLS_ROUTER_QUEUE_TIMEOUT_SECS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    queue_timeout_secs: Option<u64>,
    /// Largest HTTP body in bytes.
    #[arg(long, env = "SCLS_ROUTER_MAX_PAYLOAD_SIZE", default_value_t = 8 << 20, value_parser = at_least_one)]
    pub max_payload_size: usize,
    /// Folded into the names of all KV blocks; routers with different keys share no cache.
    #[arg(long, env = "SCLS_ROUTER_FLEET_KEY", default_value = "", hide_env_values = true)]
    fleet_key: String,
    /// Keys of which clients must send one as `authorization: Bearer KEY`, separated by commas. Other users of the
    /// machine can read a command line: the environment is the better place.
    #[arg(long, env = "SCLS_ROUTER_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// error, warn, info, debug or trace, or a filter like `router_server=debug`.
    #[arg(long, env = "SCLS_ROUTER_LOG_LEVEL", default_value = "info", value_parser = log_filter)]
    pub log_level: String,
    /// Logs as JSON lines.
    #[arg(long, env = "SCLS_ROUTER_LOG_JSON", value_parser = BoolishValueParser::new())]
    pub log_json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Policy {
    /// New prefill tokens times batch size; the smallest wins.
    Product,
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
            Self::RoundRobin => (PolicyName::RoundRobin, "round_robin"),
            Self::Random => (PolicyName::Random, "random"),
            Self::LeastRequests => (PolicyName::LeastRequests, "least_requests"),
        }
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
    let rest = rest.ok_or_else(|| format!("a worker is grpc://host:port or http://host:port: {text}"))?;
    let wrong = |what: &str| format!("{what}: {text}\na worker is grpc://host:port");
    let uri: Uri = format!("http://{rest}").parse().map_err(|error| wrong(&format!("no address, {error}")))?;
    let host = uri.host().unwrap_or_default();
    if host.is_empty() || host == "[]" || uri.authority().is_some_and(|all| all.as_str().contains('@')) {
        return Err(wrong("not a host and a port"));
    }
    if uri.path() != "/" || uri.query().is_some() || text.contains('#') {
        return Err(wrong("an address of a worker has no path"));
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
    /// The values that all pools are made with.
    pub fn pool_config(&self) -> PoolConfig {
        let (policy, name) = self.policy.core();
        PoolConfig {
            scheduler: Config {
                policy,
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
            Command::Serve { worker_urls, .. } => worker_urls.iter().map(|urls| urls.0.len()).sum(),
            _ => 0,
        };
        assert_eq!(parse(&["x", "serve", "--worker-urls", "grpc://a:1", "grpc://b:2", "--port", "0"]), 2);
        assert_eq!(parse(&["x", "serve", "--worker-urls", "grpc://a:1,grpc://b:2"]), 2);
        assert_eq!(parse(&["x", "serve", "--worker-urls", " grpc://a:1  grpc://b:2, grpc://c:3 "]), 3);
        Cli::try_parse_from(["x", "serve"]).expect_err("no workers");
        Cli::try_parse_from(["x", "serve", "--worker-urls", " , "]).expect_err("no workers");
    }
}
