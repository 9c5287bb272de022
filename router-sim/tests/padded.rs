//! The modelled worker that pads: its rectangles, its ceilings, and the part of the Session contract it keeps.

mod common;

use std::sync::Arc;

use common::{VOCAB, answer, prompt, spec};
use router_core::{
    BatchEnd, BlockHash, Blocks, FinishReason, Keep, Layout, Micros, Plan, PlanNo, Refusal, RequestId, RowId, RowKey,
    RowStart, SliceReport, Tokens, WorkerMessage, WorkerSpec,
};
use router_sim::{Command, Random, StaticWorker, Terms, Timing};

fn key(request: u64) -> RowKey {
    RowKey { row: RowId { request: RequestId(request), choice: 0 }, attempt: 0 }
}

fn row(request: u64, len: usize, max_tokens: u64) -> RowStart {
    let prompt: Arc<[u32]> = prompt(request as u32, len).into();
    let (root, output) = (BlockHash(1), Vec::new());
    let (max_tokens, prefill_budget) = (Tokens(max_tokens), Tokens::ZERO);
    RowStart { key: key(request), slice_no: 0, root, prompt, output, max_tokens, hold_rank: 0, prefill_budget }
}

fn plan(no: u64, base: u64, add: Vec<RowStart>, steps: u32) -> Plan {
    let (no, base) = (PlanNo(no), PlanNo(base));
    let ceiling = Blocks(u64::MAX);
    Plan { no, base, keep: Keep::Survivors, leave: Vec::new(), add, steps, ceiling, ranks: Vec::new() }
}

struct Bench {
    worker: StaticWorker,
    now: Micros,
    out: Vec<WorkerMessage>,
}

impl Bench {
    fn new() -> Self {
        Self::of(WorkerSpec { layout: Layout::Padded, ..spec(64, 8) }, 1)
    }

    fn of(spec: WorkerSpec, told_every: u32) -> Self {
        let worker = StaticWorker::new(spec, Timing::default()).telling_every(told_every);
        let mut bench = Self { worker, now: Micros::ZERO, out: Vec::new() };
        bench.does(Command::Hello);
        bench.out.clear();
        bench
    }

    fn does(&mut self, command: Command) {
        self.worker.command(self.now, command, &mut self.out);
    }

    fn plan(&mut self, plan: Plan) {
        self.does(Command::Plan(plan, Vec::new()));
    }

    /// So many iterations, or until nothing runs.
    fn steps(&mut self, most: u32) {
        for _ in 0..most {
            let Some(at) = self.worker.next_wake() else { return };
            self.now = at;
            self.worker.wake(at, &mut self.out);
        }
    }

    fn reports(&self) -> Vec<&SliceReport> {
        let report =
            |message| if let &WorkerMessage::SliceReported(ref report) = message { Some(report) } else { None };
        self.out.iter().filter_map(report).collect()
    }

    fn refusals(&self) -> Vec<(u64, Refusal)> {
        let refusal = |message: &WorkerMessage| match message {
            WorkerMessage::Refused { plan, reason, .. } => Some((plan.0, *reason)),
            _ => None,
        };
        self.out.iter().filter_map(refusal).collect()
    }

    /// All tokens that were told of a row; each follows the one before.
    fn tokens(&self, of: u64) -> Vec<u32> {
        let mut tokens = Vec::new();
        for message in &self.out {
            let WorkerMessage::Steps { rows, .. } = message else { continue };
            for row in rows.iter().filter(|row| row.key == key(of)) {
                assert_eq!(row.first_index as usize, tokens.len());
                tokens.extend(&row.ids);
            }
        }
        tokens
    }
}

#[test]
fn ended_rows_stay_in_the_rectangle_and_nothing_outlives_it() {
    for told_every in [1, 4] {
        let mut bench = Bench::of(WorkerSpec { layout: Layout::Padded, ..spec(64, 8) }, told_every);
        bench.plan(plan(1, 0, vec![row(1, 10, 5), row(2, 30, 3), row(3, 20, 8)], 6));
        bench.steps(100);
        let [report] = bench.reports()[..] else { panic!("one batch ran") };
        assert_eq!((report.end, report.steps, report.next), (BatchEnd::Steps, 6, None));
        // prompts: 20 and 10 cells beside those of 30 tokens; rows 1 and 2 had ended for 1 and 3 steps
        assert_eq!((report.pad, report.invalid), (Tokens(30), Tokens(4)));
        let rows: Vec<_> = report.rows.iter().map(|r| (r.emitted.0, r.computed.0, r.held, r.prefill_left.0)).collect();
        assert_eq!(rows, [(5, 14, false, 0), (3, 32, false, 0), (6, 25, false, 26)]);
        let finish: Vec<_> = report.rows.iter().map(|row| row.finish).collect();
        assert_eq!(finish, [Some(FinishReason::Length), Some(FinishReason::Length), None]);
        // three rows of 32 positions
        assert_eq!(report.peak, Blocks(6));
        // Timing: a pass of 90 cells in one iteration, five steps of 4,000 and 50 a row
        assert_eq!((report.prefill, report.decode), (Micros(4_000 + 150 + 4_500), Micros(5 * 4_150)));
        for (of, len, n) in [(1, 10, 5), (2, 30, 3), (3, 20, 6)] {
            assert_eq!(bench.tokens(of), answer(&prompt(of as u32, len), n));
        }
        assert!(!bench.out.iter().any(|message| matches!(message, WorkerMessage::KvDelta { .. })));
        assert_eq!(bench.worker.evicted(), Tokens(25));
        // the row that is left is known, and all of it is prefilled again
        bench.plan(plan(2, 1, Vec::new(), 10));
        bench.steps(100);
        assert_eq!(bench.reports()[1].end, BatchEnd::AllDone);
        assert_eq!(bench.reports()[1].rows[0].computed, Tokens(27));
        assert_eq!(bench.tokens(3), answer(&prompt(3, 20), 8));
        assert_eq!(bench.worker.load(), [0, 0, 64, 0, 0, 0]);
    }
}

#[test]
fn plans_stand_are_replaced_and_go_stale() {
    let mut bench = Bench::new();
    bench.plan(plan(1, 0, vec![row(1, 10, 50)], 3));
    bench.plan(plan(2, 1, vec![row(2, 10, 50)], 3));
    bench.plan(plan(4, 1, vec![row(3, 10, 50)], 3));
    bench.plan(plan(3, 1, vec![row(4, 10, 50)], 3));
    bench.plan(plan(5, 0, vec![row(5, 10, 50)], 3));
    assert_eq!(bench.refusals(), [(3, Refusal::Stale), (5, Refusal::Stale)]);
    bench.steps(3);
    assert_eq!(bench.reports()[0].next, Some(PlanNo(4)));
    assert_eq!(bench.worker.running(), Some(PlanNo(4)));
    bench.steps(3);
    let rows: Vec<_> = bench.reports()[1].rows.iter().map(|row| row.key).collect();
    assert_eq!((rows, bench.reports()[1].next), (vec![key(1), key(3)], None));
    // nothing runs: only the last batch is a base
    bench.plan(plan(6, 1, Vec::new(), 3));
    assert_eq!(bench.refusals().last(), Some(&(6, Refusal::Stale)));
    bench.plan(plan(7, 4, Vec::new(), 3));
    assert_eq!(bench.worker.running(), Some(PlanNo(7)));
}

#[test]
fn a_cut_ends_the_batch_at_the_step_boundary() {
    let mut bench = Bench::new();
    bench.plan(plan(1, 0, vec![row(1, 10, 50), row(2, 12, 50)], 30));
    bench.steps(2);
    bench.does(Command::Cut(PlanNo(9), None));
    bench.steps(1);
    bench.does(Command::Cut(PlanNo(1), Some(6)));
    bench.steps(2);
    assert!(bench.reports().is_empty());
    bench.steps(1);
    assert_eq!((bench.reports()[0].end, bench.reports()[0].steps), (BatchEnd::Cut, 6));
    bench.plan(plan(2, 1, Vec::new(), 30));
    bench.does(Command::Cut(PlanNo(2), None));
    bench.steps(1);
    assert_eq!((bench.reports()[1].end, bench.reports()[1].steps), (BatchEnd::Cut, 1));
    assert_eq!(bench.tokens(1), answer(&prompt(1, 10), 7));
}

#[test]
fn a_dropped_row_keeps_its_lane_and_leaves_the_plan_that_stands() {
    let mut bench = Bench::new();
    bench.plan(plan(1, 0, vec![row(1, 10, 50), row(2, 10, 50)], 5));
    bench.plan(Plan { keep: Keep::List(vec![key(1), key(2)]), ..plan(2, 1, vec![row(3, 10, 50)], 5) });
    bench.steps(2);
    bench.does(Command::Drop(vec![key(2), key(3)]));
    bench.steps(3);
    let report = bench.reports()[0];
    assert_eq!((report.steps, report.invalid, report.next), (5, Tokens(3), Some(PlanNo(2))));
    assert_eq!(report.rows[1].finish, Some(FinishReason::Cancelled));
    bench.does(Command::Drop(vec![key(1)]));
    bench.steps(1);
    let report = bench.reports()[1];
    assert_eq!((report.end, report.rows.len(), report.steps), (BatchEnd::AllDone, 1, 1));
    assert_eq!(bench.worker.load(), [0, 0, 64, 0, 0, 0]);
    // a listed row that ended is passed over, one that was never known is not
    bench.plan(Plan { keep: Keep::List(vec![key(1)]), ..plan(3, 2, vec![row(4, 10, 50)], 5) });
    assert_eq!(bench.worker.running(), Some(PlanNo(3)));
    bench.does(Command::Hello);
    bench.plan(Plan { keep: Keep::List(vec![key(8)]), ..plan(1, 0, Vec::new(), 5) });
    assert_eq!(bench.refusals(), [(1, Refusal::UnknownRow)]);
}

#[test]
fn what_does_not_fit_or_cannot_be_is_refused() {
    let mut bench = Bench::new();
    // 8 rows of 9 blocks where 64 are; 7 fit
    let eight = |count: u64| (0..count).map(|i| row(i, if i == 0 { 100 } else { 5 }, 60)).collect::<Vec<_>>();
    bench.plan(plan(1, 0, eight(8), 45));
    bench.plan(Plan { ceiling: Blocks(62), ..plan(2, 0, eight(7), 45) });
    bench.plan(plan(3, 0, (0..9).map(|i| row(i, 1, 1)).collect(), 1));
    bench.plan(plan(4, 0, vec![row(1, 0, 5)], 1));
    bench.plan(plan(5, 0, vec![row(1, 5, 5)], 0));
    let all = [Refusal::NoMemory, Refusal::NoMemory, Refusal::TooManyRows, Refusal::Unsupported, Refusal::Unsupported];
    assert_eq!(bench.refusals(), (1..).zip(all).collect::<Vec<_>>());
    bench.plan(Plan { ceiling: Blocks(63), ..plan(6, 0, eight(7), 45) });
    bench.steps(100);
    assert_eq!(bench.reports()[0].peak, Blocks(63));
}

/// Whatever ends when, no rectangle passes its ceiling; it reaches it if no row ends early.
#[test]
fn the_ceiling_holds_and_is_exact_without_early_ends() {
    let mut random = Random::new(11);
    for _ in 0..3_000 {
        let rows: Vec<RowStart> =
            (0..1 + random.below(6)).map(|i| row(i, 1 + random.below(90) as usize, 1 + random.below(60))).collect();
        let steps = 1 + random.below(70) as u32;
        let ends = random.chance(0.7);
        let terms = rows.iter().filter(|_| ends).map(|start| {
            let length = 1 + random.below(60) as u32;
            (start.key, Terms::ending_at(&start.prompt, length, VOCAB))
        });
        let terms = terms.collect();
        let positions = |start: &RowStart| start.prompt.len() as u64 + start.max_tokens.0.min(steps.into()) - 1;
        let longest = rows.iter().map(positions).max().expect("a row");
        let ceiling = Blocks(rows.len() as u64 * longest.div_ceil(16));
        let mut bench = Bench::new();
        bench.does(Command::Plan(Plan { ceiling, ..plan(1, 0, rows, steps) }, terms));
        bench.steps(100);
        let [report] = bench.reports()[..] else { panic!("it fits: {:?}", bench.refusals()) };
        assert!(report.peak <= ceiling);
        assert!(ends || report.peak == ceiling, "{} of {ceiling}", report.peak);
    }
}
