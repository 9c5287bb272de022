//! The hotspot guard: where few workers hold a prefix that most requests share, the product may send all of them there.
//!
//! It sees which prefixes are popular among the latest requests, and who holds them. A class `c` is safe if its share
//! `x_c` of the requests is at most the share of workers that hold it, `x_c <= |M| / n`: then even if all of it goes to
//! its holders M and all else to the others, nobody gets more than his part (arXiv 2603.15202, section 5; this form
//! derived in `docs/hotspot.md`). Where it is not safe there is an alarm, and if then `2|M|` requests of the class in a
//! row would still go to a holder, holders are filtered: each request makes one holder more, until it is safe again.
//!
//! Nothing can be set. It knows no text and no session: a class is a chained hash, so a prefix.

use std::collections::VecDeque;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use crate::block::BlockHash;
use crate::policy::Candidate;
use crate::units::Blocks;

/// Requests of the window for each worker. A minute, or 2,000 requests, see a burst a second too late: by then hundreds
/// queue at its one holder. [simulation study]
const WINDOW: usize = 16;
/// A class has at least so many requests of the window for each worker: an eighth of the window. Of fewer, two for each
/// worker, nobody can tell a hotspot from chance. [simulation study]
const POPULAR: usize = 2;
/// An alarm begins when the holders' part is this many tenths of what is safe: counts waver.
const ALARM_TENTHS: u64 = 11;
/// Depths up to this are all counted.
const EVERY_DEPTH: usize = 16;

/// Depths, in blocks, at which prefixes are counted: each of the first 16, then each a quarter deeper than the last. So
/// the depth of a class is at most a fifth too small, and where it is, holders of a little less than the whole prefix
/// count as holders, which they nearly are.
fn ladder() -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |depth: &usize| {
        Some(if *depth < EVERY_DEPTH { depth + 1 } else { depth.saturating_add(depth / 4) })
    })
}

/// What the guard does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guarding {
    /// Nothing: there is none.
    #[default]
    Off,
    /// It says what it sees, and lets everything pass: decisions are those without it.
    Watch,
    /// It keeps rows from holders, where they are too few.
    Filter,
}

/// What the guard has seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hotspots {
    /// Times a class began to be unsafe.
    pub alarms: u64,
    /// Decisions that went elsewhere because holders were filtered.
    pub filtered: u64,
    /// Classes that were unsafe at their last decision, and had one in the window.
    pub alarmed: u64,
    /// Those of them whose holders are filtered.
    pub filtering: u64,
}

/// A decision as the guard saw it: the class of its prompt, before it was counted itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Name of the class: the deepest popular prefix.
    pub class: BlockHash,
    /// Its depth.
    pub depth: Blocks,
    /// Requests of the class in the window.
    pub requests: u32,
    /// Requests of the window.
    pub window: u32,
    /// `n`: workers that could have the row.
    pub workers: u32,
    /// `|M|`: those of them that hold the class, on their way included.
    pub holders: u32,
    /// The class is unsafe.
    pub alarm: bool,
    /// Without the guard a holder would have it.
    pub preferred: bool,
    /// It went elsewhere: holders were filtered.
    pub filtered: bool,
}

impl Sighting {
    /// `x_c`: the class's share of the window.
    pub fn share(&self) -> f64 {
        f64::from(self.requests) / f64::from(self.window.max(1))
    }

    /// `x_c * n / |M|`: how many times its part a holder gets if all of the class goes to holders. Up to 1 it is safe.
    pub fn pressure(&self) -> f64 {
        self.share() * f64::from(self.workers) / f64::from(self.holders.max(1))
    }

    /// Whether the holders' part is above so many tenths of what is safe; where all are holders, or none is, there is nobody
    /// to turn to.
    fn is_above(&self, tenths: u64) -> bool {
        let [requests, window] = [self.requests, self.window].map(u64::from);
        let [workers, holders] = [self.workers, self.holders].map(u64::from);
        (1..workers).contains(&holders) && requests * workers * 10 > tenths * holders * window
    }
}

/// A class that was unsafe at its last decision.
#[derive(Clone, Copy, Debug, Default)]
struct Alarm {
    /// Decisions in a row that would have gone to a holder.
    preferred: u64,
    /// They were too many: holders are filtered until it is safe.
    filtering: bool,
    /// Requests counted before the last of these decisions.
    at: u64,
}

/// Watches decisions, and says where the holders of a prefix are not to be chosen.
///
/// One look-up and one count of at most 16 depths, and 4 for each doubling beyond 16 blocks, a decision; the memory is that
/// of the counts of 16 requests for each worker.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    /// Whether it may filter.
    filters: bool,
    /// Names of the counted prefixes of the window's requests, oldest first.
    names: VecDeque<BlockHash>,
    /// How many each request has.
    requests: VecDeque<u16>,
    /// Requests of the window that begin with this prefix.
    counts: HashMap<BlockHash, u32>,
    alarms: HashMap<BlockHash, Alarm>,
    /// Requests that make a class.
    popular: usize,
    /// Requests counted so far.
    counted: u64,
    total: Hotspots,
}

impl Guard {
    /// One that does this, if it is anything.
    pub(crate) fn new(guarding: Guarding) -> Option<Self> {
        (guarding != Guarding::Off).then(|| Self {
            filters: guarding == Guarding::Filter,
            names: VecDeque::new(),
            requests: VecDeque::new(),
            counts: HashMap::new(),
            alarms: HashMap::new(),
            popular: usize::MAX,
            counted: 0,
            total: Hotspots::default(),
        })
    }

    /// What it has seen and done.
    pub(crate) fn hotspots(&self) -> Hotspots {
        let filtering = self.alarms.values().filter(|alarm| alarm.filtering).count() as u64;
        Hotspots { alarmed: self.alarms.len() as u64, filtering, ..self.total }
    }

    /// The class of a prompt, if it is of one, where without the guard the candidate `best` would be chosen. Its holders are
    /// those that match it at least so deep. If they are not to be chosen, they are marked as filtered.
    pub(crate) fn judge(
        &self,
        chain: &[BlockHash],
        matched: &[usize],
        candidates: &mut [Candidate],
        best: usize,
    ) -> Option<Sighting> {
        let (class, depth, requests) = self.class(chain)?;
        let holds = |candidate: &Candidate| matched.get(candidate.worker.0 as usize).is_some_and(|&at| at >= depth);
        let mut sighting = Sighting {
            class,
            depth: Blocks(depth as u64),
            requests,
            window: self.requests.len() as u32,
            workers: candidates.len() as u32,
            holders: candidates.iter().filter(|candidate| holds(candidate)).count() as u32,
            alarm: false,
            preferred: candidates.get(best).is_some_and(holds),
            filtered: false,
        };
        let known = self.alarms.get(&class);
        sighting.alarm = sighting.is_above(if known.is_some() { 10 } else { ALARM_TENTHS });
        sighting.filtered = sighting.alarm && sighting.preferred && known.is_some_and(|alarm| alarm.filtering);
        if sighting.filtered {
            for candidate in candidates {
                candidate.filtered = holds(candidate);
            }
        }
        Some(sighting)
    }

    /// A decision was made by this sighting.
    pub(crate) fn decided(&mut self, sighting: Option<&Sighting>) {
        let Some(sighting) = sighting else { return };
        if !sighting.alarm {
            self.alarms.remove(&sighting.class);
            return;
        }
        let alarm = self.alarms.entry(sighting.class).or_insert_with(|| {
            self.total.alarms += 1;
            Alarm::default()
        });
        alarm.preferred = if sighting.preferred { alarm.preferred + 1 } else { 0 };
        alarm.filtering |= self.filters && alarm.preferred >= 2 * u64::from(sighting.holders);
        alarm.at = self.counted;
        self.total.filtered += u64::from(sighting.filtered);
    }

    /// The deepest prefix of the chain that is popular. Counts only fall with depth, so the first that is too small ends it.
    fn class(&self, chain: &[BlockHash]) -> Option<(BlockHash, usize, u32)> {
        let mut deepest = None;
        for depth in ladder().take_while(|depth| *depth <= chain.len()) {
            let name = chain[depth - 1];
            match self.counts.get(&name) {
                Some(&count) if count as usize >= self.popular => deepest = Some((name, depth, count)),
                _ => break,
            }
        }
        deepest
    }

    /// A prompt was asked for: takes it in, and those out that are too old for so many workers.
    pub(crate) fn count(&mut self, chain: &[BlockHash], workers: usize) {
        let window = WINDOW * workers.max(1);
        self.popular = POPULAR * workers.max(1);
        let before = self.names.len();
        for depth in ladder().take_while(|depth| *depth <= chain.len()) {
            let name = chain[depth - 1];
            *self.counts.entry(name).or_default() += 1;
            self.names.push_back(name);
        }
        // a ladder has some 200 rungs up to all memory there is
        self.requests.push_back((self.names.len() - before) as u16);
        self.counted += 1;
        while self.requests.len() > window {
            self.forget_oldest();
        }
        // of a class that is popular no more, or of which only parts still are, nothing is known
        let (counts, popular, oldest) = (&self.counts, self.popular, self.counted.saturating_sub(window as u64));
        self.alarms.retain(|class, alarm| {
            alarm.at >= oldest && counts.get(class).is_some_and(|&count| count as usize >= popular)
        });
    }

    fn forget_oldest(&mut self) {
        let names = self.requests.pop_front().unwrap_or(0);
        for name in self.names.drain(..usize::from(names)) {
            let Entry::Occupied(mut count) = self.counts.entry(name) else { continue };
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard::new(Guarding::Filter).expect("one")
    }

    fn chain(request: u64, len: u64) -> Vec<BlockHash> {
        (0..len).map(|at| BlockHash(request << 32 | at)).collect()
    }

    #[test]
    fn the_ladder_is_short_and_its_error_a_fifth() {
        let rungs: Vec<usize> = ladder().take_while(|depth| *depth <= 1250).collect();
        assert_eq!((rungs.len(), rungs[15], rungs[16]), (35, 16, 20));
        for pair in rungs.windows(2) {
            assert!(5 * pair[0] >= 4 * (pair[1] - 1), "what is {} deep seems {} deep", pair[1] - 1, pair[0]);
        }
        // to the end of all memory, and no further
        assert!(ladder().take_while(|depth| *depth < usize::MAX).count() < usize::from(u16::MAX));
    }

    #[test]
    fn memory_is_that_of_the_window() {
        let mut guard = guard();
        for request in 0..5000 {
            guard.count(&chain(request, 300), 4);
        }
        assert_eq!((guard.requests.len(), guard.names.len(), guard.counts.len()), (64, 64 * 29, 64 * 29));
        // prompts without a whole block count as requests
        (0..60).for_each(|_| guard.count(&[], 4));
        assert_eq!((guard.requests.len(), guard.counts.len()), (64, 4 * 29));
        // and a window for fewer workers is shorter
        guard.count(&chain(1, 3), 1);
        assert_eq!((guard.requests.len(), guard.names.len(), guard.counts.len()), (16, 3, 3));
        guard.count(&[], 0);
        assert_eq!(guard.requests.len(), 16, "at least as for one");
    }

    /// Two workers, the first of which holds all and would have all.
    fn judge(guard: &Guard, chain: &[BlockHash]) -> Option<Sighting> {
        let mut candidates = [0, 1].map(|slot| Candidate { worker: crate::WorkerId(slot), ..Candidate::default() });
        guard.judge(chain, &[chain.len(), 0], &mut candidates, 0)
    }

    fn decide(guard: &mut Guard, chain: &[BlockHash]) {
        let sighting = judge(guard, chain);
        guard.decided(sighting.as_ref());
        guard.count(chain, 2);
    }

    #[test]
    fn a_class_that_is_only_part_of_deeper_ones_leaves_nothing() {
        let mut guard = guard();
        let hot = chain(7, 4);
        (0..16).for_each(|_| decide(&mut guard, &hot[..2]));
        assert_eq!((guard.hotspots().alarmed, guard.hotspots().filtering), (1, 1));
        // from here on all go deeper: the class is theirs, and the one above it is nobody's last decision
        (0..60).for_each(|_| decide(&mut guard, &hot));
        assert_eq!((guard.hotspots().alarmed, guard.hotspots().filtering), (1, 1));
        let (above, below) = (judge(&guard, &hot[..2]).expect("a class"), judge(&guard, &hot).expect("a class"));
        assert_eq!((above.depth, above.alarm, above.filtered), (Blocks(2), true, false), "it begins anew");
        assert_eq!((below.depth, below.alarm, below.filtered), (Blocks(4), true, true));
    }

    #[test]
    fn one_that_watches_sees_the_same_and_filters_nothing() {
        let (mut watch, mut filter) = (Guard::new(Guarding::Watch).expect("one"), guard());
        let hot = chain(7, 4);
        for _ in 0..16 {
            let seen = [&watch, &filter].map(|guard| judge(guard, &hot));
            assert_eq!(seen[0], seen[1].map(|sighting| Sighting { filtered: false, ..sighting }));
            for guard in [&mut watch, &mut filter] {
                decide(guard, &hot);
            }
        }
        assert_eq!(watch.hotspots(), Hotspots { alarms: 1, filtered: 0, alarmed: 1, filtering: 0 });
        assert_eq!(filter.hotspots(), Hotspots { alarms: 1, filtered: 10, alarmed: 1, filtering: 1 });
        assert!(Guard::new(Guarding::Off).is_none());
    }

    #[test]
    fn a_class_that_leaves_the_window_leaves_nothing() {
        let mut guard = guard();
        let hot = chain(7, 4);
        let judge = |guard: &Guard| judge(guard, &hot);
        (0..16).for_each(|_| decide(&mut guard, &hot));
        assert_eq!(guard.hotspots(), Hotspots { alarms: 1, filtered: 10, alarmed: 1, filtering: 1 });
        assert!(judge(&guard).expect("a class").pressure() > 1.9);
        for request in 0..29 {
            guard.count(&chain(100 + request, 4), 2);
        }
        assert_eq!(judge(&guard), None, "three of 32 are no class");
        assert_eq!(guard.hotspots(), Hotspots { alarms: 1, filtered: 10, alarmed: 0, filtering: 0 });
        // with more workers it takes more requests to be one
        (0..4).for_each(|_| guard.count(&hot, 2));
        assert!(judge(&guard).is_some());
        guard.count(&hot, 8);
        assert_eq!(judge(&guard), None);
    }
}
