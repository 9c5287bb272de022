//! The command line: flags with their environment twins, turned once into checked values.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use router_core::{Config, PolicyName};

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
        #[arg(long, env = "SCLS_ROUTER_WORKER_URLS", num_args = 1.., value_delimiter = ',', required = true, value_parser = worker_url)]
        worker_urls: Vec<String>,
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
        #[arg(long, env = "SCLS_ROUTER_LOG_LEVEL", default_value = "info")]
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
    #[arg(long, env = "SCLS_ROUTER_MAX_CONCURRENT_REQUESTS", default_value_t = 4096)]
    max_concurrent_requests: usize,
    /// Longest a request may take.
    #[arg(long, env = "SCLS_ROUTER_REQUEST_TIMEOUT_SECS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    request_timeout_secs: u64,
    /// Largest HTTP body in bytes.
    #[arg(long, env = "SCLS_ROUTER_MAX_PAYLOAD_SIZE", default_value_t = 8 << 20)]
    pub max_payload_size: usize,
    /// Folded into the names of all KV blocks; routers with different keys share no cache.
    #[arg(long, env = "SCLS_ROUTER_FLEET_KEY", default_value = "", hide_env_values = true)]
    fleet_key: String,
    /// error, warn, info, debug or trace, or a filter like `router_server=debug`.
    #[arg(long, env = "SCLS_ROUTER_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// Logs as JSON lines.
    #[arg(long, env = "SCLS_ROUTER_LOG_JSON")]
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

fn worker_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("grpc://").or_else(|| text.strip_prefix("http://"));
    let rest = rest.ok_or("a worker is grpc://host:port or http://host:port")?;
    let port =
        rest.trim_end_matches('/').rsplit_once(':').map(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if port == Some(true) {
        Ok(text.trim_end_matches('/').to_owned())
    } else {
        Err("the port is missing: grpc://host:port".into())
    }
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
        for wrong in ["127.0.0.1:5", "grpc://host", "https://host:5", "grpc://:5", "grpc://host:70000"] {
            worker_url(wrong).expect_err(wrong);
        }
    }

    #[test]
    fn urls_come_by_space_or_comma() {
        let parse = |args: &[&str]| match Cli::try_parse_from(args).expect("valid").command {
            Command::Serve { worker_urls, .. } => worker_urls.len(),
            _ => 0,
        };
        assert_eq!(parse(&["x", "serve", "--worker-urls", "grpc://a:1", "grpc://b:2", "--port", "0"]), 2);
        assert_eq!(parse(&["x", "serve", "--worker-urls", "grpc://a:1,grpc://b:2"]), 2);
        Cli::try_parse_from(["x", "serve"]).expect_err("no workers");
    }
}
