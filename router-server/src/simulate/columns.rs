//! What became of each request of a run, as columns: for whoever wants to look closer than a report does.

use router_sim::{Record, Run};

/// Values of one kind, one for each request in order of arrival.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Counts and places.
    Whole(Vec<u32>),
    /// Seconds; not a number where there is none.
    Seconds(Vec<f64>),
}

impl Column {
    /// Its values in native order, and their type as Python's `array` calls it.
    pub fn bytes(&self) -> (char, Vec<u8>) {
        match self {
            Self::Whole(values) => ('I', values.iter().flat_map(|value| value.to_ne_bytes()).collect()),
            Self::Seconds(values) => ('d', values.iter().flat_map(|value| value.to_ne_bytes()).collect()),
        }
    }
}

/// Columns by name.
pub fn columns(run: &Run<'_>, record: &Record) -> Vec<(&'static str, Column)> {
    let whole = |of: &dyn Fn(&router_sim::Served) -> u32| Column::Whole(record.served.iter().map(of).collect());
    let seconds = |of: &dyn Fn(&router_sim::Served) -> Option<f64>| {
        Column::Seconds(record.served.iter().map(|one| of(one).unwrap_or(f64::NAN)).collect())
    };
    let input = |one: &router_sim::Served| run.trace.requests.get(one.request as usize).map_or(0, |it| it.input);
    vec![
        ("request", whole(&|one| one.request)),
        ("worker", whole(&|one| one.worker)),
        ("arrived", seconds(&|one| Some(one.arrived.0 as f64 * 1e-6))),
        ("ttft", seconds(&router_sim::Served::ttft)),
        ("tpot", seconds(&router_sim::Served::tpot)),
        ("latency", seconds(&router_sim::Served::latency)),
        ("gap", seconds(&|one| (one.output > 1).then_some(f64::from(one.gap) * 1e-6))),
        ("input_tokens", whole(&input)),
        ("cached_tokens", whole(&|one| one.hit)),
        ("output_tokens", whole(&|one| one.output)),
        ("slices", whole(&|one| one.slices)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_as_an_array_reads_them() {
        assert_eq!(Column::Whole(vec![1, 2]).bytes(), ('I', [1u32.to_ne_bytes(), 2u32.to_ne_bytes()].concat()));
        let (kind, bytes) = Column::Seconds(vec![0.5]).bytes();
        assert_eq!((kind, bytes), ('d', 0.5f64.to_ne_bytes().to_vec()));
    }
}
