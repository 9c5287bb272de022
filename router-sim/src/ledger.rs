//! A line a request: what a long run keeps of its rows, whose tokens nobody reads.

use router_core::{BatchEnd, FinishReason, Micros, RequestId, RowEnd, SliceReport, WorkerId};

use crate::served::{Lane, Served};

/// Lanes are drawn of the first so many workers, and of each the first so many slices.
const LANE_WORKERS: u32 = 16;
const LANE_SLICES: u16 = 512;

/// Requests are named by their line: their number in order of arrival.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) served: Vec<Served>,
    /// When the last token of each came.
    last: Vec<Micros>,
    /// Lines that no worker could take.
    rejected: Vec<u32>,
    pub(crate) lanes: Vec<Lane>,
    drawn: [u16; LANE_WORKERS as usize],
    /// Places in the trace of requests that are over, until somebody asks.
    pub(crate) over: Vec<u32>,
    pub(crate) finished: u64,
}

impl Ledger {
    pub(crate) fn arrived(&mut self, now: Micros, place: u32) {
        self.served.push(Served { request: place, arrived: now, ..Served::default() });
        self.last.push(Micros::ZERO);
    }

    pub(crate) fn drew(&mut self, now: Micros, request: RequestId, first_index: u32, count: usize) {
        let at = request.0 as usize;
        let (Some(line), Some(last)) = (self.served.get_mut(at), self.last.get_mut(at)) else { return };
        if first_index == 0 {
            line.first = now;
        } else {
            let gap = now.saturating_sub(*last).0;
            line.gap = line.gap.max(u32::try_from(gap).unwrap_or(u32::MAX));
        }
        line.output = first_index + count as u32;
        *last = now;
    }

    pub(crate) fn ended(&mut self, now: Micros, request: RequestId, end: &RowEnd) {
        let Some(line) = self.served.get_mut(request.0 as usize) else { return };
        // one that failed has not been served, though nobody waits for it any more
        if matches!(end.reason, FinishReason::Stop | FinishReason::Length) {
            line.ended = now;
            self.finished += 1;
        }
        line.worker = end.worker.map_or(0, |worker| worker.0);
        line.hit = end.cached.0 as u32;
        line.slices = end.slices;
        self.over.push(line.request);
    }

    pub(crate) fn rejected(&mut self, request: RequestId) {
        let Some(line) = self.served.get(request.0 as usize) else { return };
        self.rejected.push(request.0 as u32);
        self.over.push(line.request);
    }

    /// Lines of requests that were taken, and how many were not.
    pub(crate) fn close(&mut self) -> (Vec<Served>, u64) {
        let mut served = std::mem::take(&mut self.served);
        let rejected = std::mem::take(&mut self.rejected);
        let (mut line, mut next) = (0, 0);
        served.retain(|_| {
            let out = rejected.get(next) == Some(&line);
            line += 1;
            next += usize::from(out);
            !out
        });
        (served, rejected.len() as u64)
    }

    pub(crate) fn sliced(&mut self, now: Micros, worker: WorkerId, report: &SliceReport) {
        let Some(drawn) = self.drawn.get_mut(worker.0 as usize) else { return };
        if *drawn >= LANE_SLICES || report.steps == 0 {
            return;
        }
        *drawn += 1;
        let began = now.saturating_sub(report.prefill + report.decode);
        self.lanes.push(Lane {
            worker: worker.0,
            span: (began, now),
            rows: report.rows.len() as u32,
            steps: report.steps,
            cut: report.end == BatchEnd::Cut,
        });
    }
}
