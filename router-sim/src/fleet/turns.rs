//! Who comes when: in order of the trace, and in closed sessions not before the turn before it ended.

use hashbrown::HashMap;
use router_core::Micros;

use crate::run::Sessions;
use crate::trace::Trace;

/// No request.
const NONE: u32 = u32::MAX;

/// The requests that have not come.
pub(super) struct Turns<'a> {
    trace: &'a Trace,
    next: u32,
    /// The next turn of each request's session.
    after: Vec<u32>,
    /// Whether the turn before it has ended, or there is none.
    ready: Vec<bool>,
}

impl<'a> Turns<'a> {
    pub(super) fn new(trace: &'a Trace, sessions: Sessions) -> Self {
        let count = trace.requests.len();
        let (mut after, mut ready) = (vec![NONE; count], vec![true; count]);
        if sessions == Sessions::Closed {
            let mut latest: HashMap<u32, u32> = HashMap::new();
            for (request, at) in trace.requests.iter().zip(0u32..) {
                if let Some(before) = request.session.and_then(|session| latest.insert(session, at)) {
                    after[before as usize] = at;
                    ready[at as usize] = false;
                }
            }
        }
        Self { trace, next: 0, after, ready }
    }

    /// When the next request of the trace is to come, ready or not.
    pub(super) fn due(&self) -> Option<Micros> {
        self.trace.requests.get(self.next as usize).map(|request| request.at)
    }

    /// Its time has come: itself, if it comes now.
    pub(super) fn take(&mut self) -> Option<u32> {
        let request = self.next;
        self.next += 1;
        self.ready[request as usize].then_some(request)
    }

    /// A request ended: the turn after it, if its time has passed.
    pub(super) fn ended(&mut self, request: u32) -> Option<u32> {
        let after = self.after[request as usize];
        *self.ready.get_mut(after as usize)? = true;
        (after < self.next).then_some(after)
    }

    /// Whether its time has passed by the run's end.
    pub(super) fn is_past(&self, request: u32) -> bool {
        request < self.next
    }
}
