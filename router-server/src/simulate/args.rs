//! Flags of `simulate`, as they are written. What they mean is checked in one place (`plan.rs`), for the command line and
//! for Python alike, so every value is a text here.

use std::path::PathBuf;

use clap::{Args, Command, FromArgMatches};
use router_core::PolicyName;

/// Flags of `simulate`. Each list is a dimension of a grid: all combinations are run.
#[derive(Clone, Debug, Args)]
pub struct SimulateArgs {
    /// What is run.
    #[command(flatten)]
    pub asked: Asked,
    /// Where report.json, plots (PNG) and report.html go.
    #[arg(long, help_heading = "Results", value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print the report as JSON instead of a table.
    #[arg(long, help_heading = "Results")]
    pub json: bool,
    /// Replay a recorded run of real workers and print how far the model is off.
    #[arg(long, help_heading = "Results", value_name = "RUN.json", conflicts_with_all = ["trace", "synthetic"])]
    pub validate: Option<PathBuf>,
}

/// What is run.
#[derive(Clone, Debug, Args)]
pub struct Asked {
    /// Files of requests: JSON lines of requests, Mooncake's, or the CSV of Azure and `BurstGPT`; also as .gz.
    #[arg(long, help_heading = "Requests", value_name = "FILE[,..]", value_delimiter = ',')]
    pub trace: Vec<String>,
    /// Generated requests, by the name of their lengths, instead of a file.
    #[arg(long, help_heading = "Requests", value_name = "NAME")]
    pub synthetic: Option<String>,
    /// Generated requests a second.
    #[arg(long, help_heading = "Requests", value_name = "R", allow_hyphen_values = true)]
    pub rate: Option<String>,
    /// Seconds of generated requests.
    #[arg(long, help_heading = "Requests", value_name = "T", default_value = "300", allow_hyphen_values = true)]
    pub seconds: String,
    /// Times the trace's own rate: faster up to a point, then superposed copies.
    #[arg(
        long,
        help_heading = "Requests",
        value_name = "X[,..]",
        value_delimiter = ',',
        default_value = "1",
        allow_hyphen_values = true
    )]
    pub rate_scale: Vec<String>,
    /// How many copies of the trace make its rate; without it as few as do. To compare rates, as many as the highest needs.
    #[arg(long, help_heading = "Requests", value_name = "N")]
    pub copies: Option<String>,
    /// Only requests from A to B seconds of the trace.
    #[arg(long, help_heading = "Requests", value_name = "A:B", allow_hyphen_values = true)]
    pub window: Option<String>,
    /// closed: a turn waits for the previous one's end; open: every turn at its time, a stress test.
    #[arg(long, help_heading = "Requests", value_name = "closed|open", default_value = "closed")]
    pub sessions: String,
    /// Most output tokens, which every request announces; without it the trace's longest answer.
    #[arg(long, help_heading = "Requests", value_name = "TOKENS", allow_hyphen_values = true)]
    pub limit: Option<String>,
    /// How many workers.
    #[arg(
        long,
        help_heading = "Fleet",
        value_name = "N[,..]",
        value_delimiter = ',',
        default_value = "8",
        allow_hyphen_values = true
    )]
    pub workers: Vec<String>,
    /// Names of modelled devices, or files with their coefficients.
    #[arg(long, help_heading = "Fleet", value_name = "M[,..]", value_delimiter = ',', default_value = "7b-h20")]
    pub cost_model: Vec<String>,
    /// Host time of an iteration that the device waits for, in milliseconds; without it the device's own.
    #[arg(long, help_heading = "Fleet", value_name = "H[,..]", value_delimiter = ',', allow_hyphen_values = true)]
    pub host_ms: Vec<String>,
    /// What a slice start exposes, in milliseconds; without it the device's own.
    #[arg(long, help_heading = "Fleet", value_name = "O[,..]", value_delimiter = ',', allow_hyphen_values = true)]
    pub start_ms: Vec<String>,
    /// How late what workers say reaches the router, in milliseconds.
    #[arg(
        long,
        help_heading = "Fleet",
        value_name = "D[,..]",
        value_delimiter = ',',
        default_value = "0",
        allow_hyphen_values = true
    )]
    pub delay_ms: Vec<String>,
    /// Sigma of the log-normal factor on the time of slices; an iteration's is twice as wide.
    #[arg(long, help_heading = "Fleet", value_name = "SIGMA", default_value = "0", allow_hyphen_values = true)]
    pub noise: String,
    /// Sigma of the log-normal factor by which each worker is always slower or faster, unknown to the router; each draws its
    /// own, by the seed.
    #[arg(long, help_heading = "Fleet", value_name = "SIGMA", default_value = "0", allow_hyphen_values = true)]
    pub bias: String,
    /// continuous, slice, ils, scls, sls, so, pm, ab, lb; after @ its rows (continuous, sls) or its S (the others).
    #[arg(
        long,
        help_heading = "Scheduling",
        value_name = "S[,..]",
        value_delimiter = ',',
        default_value = "continuous"
    )]
    pub scheduler: Vec<String>,
    /// How a worker is chosen: ours or a rival's name, its weight after @.
    #[arg(long, help_heading = "Scheduling", value_name = "P[,..]", value_delimiter = ',', default_value = PolicyName::default().as_str())]
    pub policy: Vec<String>,
    /// What a decision moves in the router: prefixes and load; load alone as in the paper's form; or none, to show what
    /// that is for.
    #[arg(
        long,
        help_heading = "Scheduling",
        value_name = "prefixes|load|none[,..]",
        value_delimiter = ',',
        default_value = "prefixes"
    )]
    pub commit: Vec<String>,
    /// The hotspot guard.
    #[arg(long, help_heading = "Scheduling", value_name = "on|off[,..]", value_delimiter = ',', default_value = "off")]
    pub guard: Vec<String>,
    /// Runs of each combination, with seeds 1 to K: arrivals are shifted a little.
    #[arg(long, help_heading = "Runs", value_name = "K", default_value = "1", allow_hyphen_values = true)]
    pub seeds: String,
    /// A run is over at this time, whatever is left.
    #[arg(long, help_heading = "Runs", value_name = "SECONDS", allow_hyphen_values = true)]
    pub until: Option<String>,
    /// Count goodput: requests within so many seconds to the first token and so many a token after it.
    #[arg(long, help_heading = "Runs", value_name = "TTFT:TPOT", allow_hyphen_values = true)]
    pub slo: Option<String>,
    /// Runs at once; without it the cores of this machine.
    #[arg(long, help_heading = "Runs", value_name = "J", allow_hyphen_values = true)]
    pub jobs: Option<String>,
}

impl Asked {
    /// Of flags as they are typed, without a program's name.
    pub fn of<T: Into<String>>(flags: impl IntoIterator<Item = T>) -> Result<Self, String> {
        let command = Self::augment_args(Command::new("simulate").no_binary_name(true));
        let matches = command.try_get_matches_from(flags.into_iter().map(Into::into));
        matches.and_then(|matches| Self::from_arg_matches(&matches)).map_err(|error| {
            let told = error.to_string();
            let first = told.lines().next().unwrap_or_default();
            first.trim_start_matches("error: ").to_owned()
        })
    }
}

impl Default for Asked {
    /// What an empty command line says.
    fn default() -> Self {
        Self::of::<String>([]).unwrap_or_else(|error| unreachable!("defaults are values: {error}"))
    }
}

/// Flags of `doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// File of requests with block hashes.
    #[arg(long, value_name = "FILE")]
    pub trace: String,
    /// How many workers.
    #[arg(long, value_name = "N", default_value = "16", allow_hyphen_values = true)]
    pub workers: String,
    /// The name of a modelled device, or a file with its coefficients.
    #[arg(long, value_name = "M", default_value = "7b-h20")]
    pub cost_model: String,
    /// Times the trace's own rate.
    #[arg(long, value_name = "X", default_value = "1", allow_hyphen_values = true)]
    pub rate_scale: String,
    /// Where report.json, the plot (PNG) and report.html go.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}
