//! Names of things. Each is a type of its own, so that they cannot be mistaken for one another.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($int:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A worker's slot in its pool: small and dense, given by the shell, used again after the worker is gone.
    WorkerId(u32),
    "w"
);
id!(
    /// One client call.
    RequestId(u64),
    "r"
);
id!(
    /// Names a plan, and the batch it forms. Grows per worker session; 0 is "none yet".
    PlanNo(u64),
    "p"
);
id!(
    /// One start of a worker process. State of an older epoch is void.
    Epoch(u64),
    "e"
);
id!(
    /// One routing decision.
    DecisionId(u64),
    "d"
);

/// One output sequence of a request; a request with `n = 4` is four rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId {
    /// The request it belongs to.
    pub request: RequestId,
    /// Which of its choices, from 0.
    pub choice: u32,
}

/// A row at one dispatch: what arrives for an older attempt changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// The row.
    pub row: RowId,
    /// Grows at every dispatch to another worker or worker epoch.
    pub attempt: u32,
}

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.request, self.choice)
    }
}

impl fmt::Display for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.row, self.attempt)
    }
}
