//! Names as they are written on the command line, and the nearest where one is misspelt.

use router_core::{Batching, Commit, Guarding, Mode, PolicyName, Pooled};
use router_sim::{Sessions, System};

/// The name that was meant; all where none is near.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    match router_core::nearest(name, known.iter().copied()) {
        Some(best) => format!("did you mean {best}?"),
        None => format!("known: {}", known.join(", ")),
    }
}

/// A scheduler as it is written: `slice`, `slice@32`, `continuous@25`, `sls@25`.
#[derive(Clone, Debug, PartialEq)]
pub enum Scheduler {
    /// Iteration-level engines behind the router, with at most so many rows.
    Continuous(Option<u32>),
    /// Slice workers behind the scheduler.
    Scheduled(Mode, Option<u32>),
}

impl Scheduler {
    /// Reads one.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, number) = match text.split_once('@') {
            Some((name, number)) => (
                name,
                Some(
                    count(number)
                        .ok_or_else(|| format!("scheduler {text}: what follows @ is a number of at least 1"))?,
                ),
            ),
            None => (text, None),
        };
        if name == "continuous" {
            return Ok(Self::Continuous(number));
        }
        let known = Mode::ALL;
        let mode = known.into_iter().find(|mode| mode.as_str() == name).ok_or_else(|| {
            let names = known.iter().map(Mode::as_str).chain(["continuous"]);
            format!("no such scheduler: {name}; {}", nearest(name, names))
        })?;
        match (mode, number) {
            (Mode::Ils, Some(_)) => Err(format!("scheduler {text}: ils is a plan for each iteration, S is 1")),
            // sequence level has no S: its number is of rows
            (Mode::Pooled(sls), Some(rows)) if sls.slice_len.is_none() => {
                Ok(Self::Scheduled(Mode::Pooled(Pooled { batching: Batching::Fcfs(rows), ..sls }), None))
            }
            (mode, slice) => Ok(Self::Scheduled(mode, slice)),
        }
    }

    /// What is run, with the policy where this way to schedule has one.
    pub fn system(&self, policy: &str, commit: Option<Commit>, guard: bool) -> Result<System, String> {
        match self {
            Self::Continuous(_) => match commit {
                Some(commit) => {
                    let guard = if guard { Guarding::Filter } else { Guarding::Off };
                    Ok(System::Continuous { policy: policy.to_owned(), commit, guard })
                }
                None if guard => Err("the guard watches what is committed: commit none goes with guard off".into()),
                None => Ok(System::Uncommitted { policy: policy.to_owned() }),
            },
            Self::Scheduled(mode, slice_len) => {
                let (mode, slice_len) = (*mode, *slice_len);
                let policy = match mode {
                    Mode::Pooled(_) => PolicyName::Product,
                    Mode::Slice | Mode::Ils => {
                        PolicyName::ALL.into_iter().find(|known| known.as_str() == policy).ok_or_else(|| {
                            let known = PolicyName::ALL.map(PolicyName::as_str);
                            format!("scheduler {mode} has no policy {policy}; {}", nearest(policy, known))
                        })?
                    }
                };
                Ok(System::Scheduled { mode, policy, slice_len })
            }
        }
    }

    /// Most rows of an engine, where that is said.
    pub fn rows(&self) -> Option<u32> {
        if let Self::Continuous(rows) = self { *rows } else { None }
    }

    /// Whether rows are placed by a policy.
    pub fn places(&self) -> bool {
        !matches!(self, Self::Scheduled(Mode::Pooled(_), _))
    }
}

fn count(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number > 0)
}

/// Reads `closed` or `open`.
pub fn sessions(text: &str) -> Result<Sessions, String> {
    match text {
        "closed" => Ok(Sessions::Closed),
        "open" => Ok(Sessions::Open),
        _ => Err(format!("sessions are closed or open: {text}")),
    }
}

/// Reads `prefixes`, `load` or `none`.
pub fn commit(text: &str) -> Result<Option<Commit>, String> {
    match text {
        "prefixes" => Ok(Some(Commit::Prefixes)),
        "load" => Ok(Some(Commit::Load)),
        "none" => Ok(None),
        _ => Err(format!("commit is prefixes, load or none: {text}")),
    }
}

/// Reads `on` or `off`.
pub fn guard(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("guard is on or off: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedulers_are_read_with_their_number() {
        assert_eq!(Scheduler::parse("continuous@25"), Ok(Scheduler::Continuous(Some(25))));
        assert_eq!(Scheduler::parse("slice@32"), Ok(Scheduler::Scheduled(Mode::Slice, Some(32))));
        let rows = Pooled { batching: Batching::Fcfs(25), ..Pooled::sls() };
        assert_eq!(Scheduler::parse("sls@25"), Ok(Scheduler::Scheduled(Mode::Pooled(rows), None)));
        let pooled = Scheduler::parse("scls@256").expect("right");
        assert_eq!(pooled, Scheduler::Scheduled(Mode::Pooled(Pooled::scls()), Some(256)));
        assert!(!pooled.places());
        for wrong in ["slice@0", "slice@", "slice@x", "ils@4", "", "scsl"] {
            let said = Scheduler::parse(wrong).expect_err(wrong);
            assert!(!said.contains('\n'), "{said}");
        }
        assert_eq!(Scheduler::parse("contnuous"), Err("no such scheduler: contnuous; did you mean continuous?".into()));
    }

    #[test]
    fn policies_of_slices_are_the_cores() {
        let slice = Scheduler::parse("slice").expect("right");
        slice.system("product_time", Some(Commit::Prefixes), false).expect("known");
        let said = slice.system("prodct", Some(Commit::Prefixes), false).expect_err("a typo");
        assert_eq!(said, "scheduler slice has no policy prodct; did you mean product?");
    }

    #[test]
    fn the_nearest_is_near_or_all_are_told() {
        assert_eq!(nearest("rond_robin", ["product", "round_robin"]), "did you mean round_robin?");
        assert_eq!(nearest("zebra", ["product", "random"]), "known: product, random");
    }
}
