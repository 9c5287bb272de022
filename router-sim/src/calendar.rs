//! What is to happen, by time; what is due at the same time happens in the order it was put down.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use router_core::Micros;

/// The heap orders small keys; what happens lies still beside it, in places that are used again.
pub(crate) struct Calendar<T> {
    due: BinaryHeap<Reverse<(Micros, u64, u32)>>,
    places: Vec<Option<T>>,
    free: Vec<u32>,
    sequence: u64,
}

impl<T> Calendar<T> {
    pub(crate) fn new() -> Self {
        Self { due: BinaryHeap::new(), places: Vec::new(), free: Vec::new(), sequence: 0 }
    }

    pub(crate) fn push(&mut self, at: Micros, what: T) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() as u32 - 1
        });
        self.places[place as usize] = Some(what);
        self.sequence += 1;
        self.due.push(Reverse((at, self.sequence, place)));
    }

    /// The next, if it is due by `limit`.
    pub(crate) fn pop(&mut self, limit: Micros) -> Option<(Micros, T)> {
        let &Reverse((at, _, place)) = self.due.peek()?;
        if at > limit {
            return None;
        }
        self.due.pop();
        self.free.push(place);
        self.places[place as usize].take().map(|what| (at, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_happen_by_time_then_in_order() {
        let mut calendar = Calendar::new();
        for (at, name) in [(5, "c"), (1, "a"), (5, "d"), (3, "b")] {
            calendar.push(Micros(at), name);
        }
        assert_eq!(calendar.pop(Micros(0)), None);
        let first: Vec<_> = std::iter::from_fn(|| calendar.pop(Micros(4))).map(|(_, name)| name).collect();
        calendar.push(Micros(5), "e");
        let rest: Vec<_> = std::iter::from_fn(|| calendar.pop(Micros(9))).map(|(_, name)| name).collect();
        assert_eq!((first, rest), (vec!["a", "b"], vec!["c", "d", "e"]));
    }
}
