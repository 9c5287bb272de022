//! What can be wrong with a trace.

/// A trace that cannot be read or used. One line, and below it what to do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TraceError {
    /// A line of a file.
    #[error("{name}: line {line}: {problem}")]
    Line {
        /// The trace.
        name: String,
        /// From 1, after unpacking.
        line: u64,
        /// What is wrong with it.
        problem: Problem,
    },
    /// The whole.
    #[error("{name}: {problem}")]
    Whole {
        /// The trace.
        name: String,
        /// What is wrong with it.
        problem: Problem,
    },
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Problem {
    /// The gzip stream ends early or is damaged.
    #[error("the gzip stream breaks off: {0}\nfetch the file again")]
    Gzip(String),
    /// Not text.
    #[error("not UTF-8 text\nconvert the file, or check that it is a trace")]
    Text,
    /// A line without an end.
    #[error("longer than {0} bytes\na request is one line")]
    Long(usize),
    /// Nobody's format.
    #[error(
        "no known trace format\nknown are JSON Lines with arrival_s or (Mooncake) timestamp, and CSV with the columns of Azure's or BurstGPT's traces"
    )]
    Format,
    /// JSON that does not parse, lacks a field, or has one of another type.
    #[error("{0}\nbench/traces/README.md has the fields of a trace")]
    Json(String),
    /// A column that the header lacks.
    #[error("column {0} is missing\nthe first line has to name the columns")]
    Column(&'static str),
    /// A line with fewer fields than its header.
    #[error("field {0} is missing\nthe line has fewer fields than the header names; is the file complete?")]
    Field(&'static str),
    /// A field that is no number, or no time.
    #[error("{field} is {value}\n{expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it says.
        value: String,
        /// What it has to be.
        expected: &'static str,
    },
    /// A time before the one above it.
    #[error("{field} is {this} s, before the {last} s of the request above\nsort the file by it")]
    Unsorted {
        /// The field.
        field: &'static str,
        /// The time.
        this: f64,
        /// The one above.
        last: f64,
    },
    /// Blocks that cannot be those of so long a prompt.
    #[error("{blocks} blocks for {input} tokens: {expected} blocks of {size} are expected\nis the block size right?")]
    Blocks {
        /// Blocks given.
        blocks: u64,
        /// Tokens of the prompt.
        input: u64,
        /// How many it should be.
        expected: u64,
        /// The block size.
        size: u64,
    },
    /// Blocks of unknown size.
    #[error(
        "the trace has blocks, and nothing says how large they are\nput NAME.meta.json with block_size beside it, or begin it with {{\"block_size\": TOKENS}}"
    )]
    NoBlockSize,
    /// Two block sizes.
    #[error("block size {given} is given, but the trace says {said}\nleave one out")]
    BlockSize {
        /// By whoever reads.
        given: u64,
        /// By the file.
        said: u64,
    },
    /// Too much to hold.
    #[error("more than {0}\ncut the trace with a window")]
    Most(&'static str),
    /// Nobody comes.
    #[error("no requests\nis it the right file, or window?")]
    Empty,
    /// A number that scales or cuts a trace and cannot.
    #[error("{what} is {value}\n{expected}")]
    Number {
        /// Which.
        what: &'static str,
        /// What it is.
        value: f64,
        /// What it has to be.
        expected: &'static str,
    },
    /// A synthetic trace that nobody makes.
    #[error("no such synthetic trace\n{0}")]
    Unknown(String),
}
