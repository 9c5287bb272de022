//! The worker's side of the contract's messages: plans in, steps and reports out.

use router_core::{
    BatchEnd, BlockHash, Blocks, FinishReason, Keep, Plan, PlanNo, Refusal, RequestId, RowId, RowKey, RowStart, Tokens,
    WorkerMessage,
};
use router_sim::Stop;

use crate::convert::token_ids;
use crate::proto;
use crate::proto::worker_message::Body;

/// A plan that cannot be taken: which row is at fault, and the field.
pub(super) struct Bad {
    pub(super) reason: proto::refused::Reason,
    pub(super) row: Option<proto::RowId>,
    pub(super) field: &'static str,
}

pub(super) fn key(row: proto::RowId) -> RowKey {
    RowKey { row: RowId { request: RequestId(row.request), choice: row.choice }, attempt: row.attempt }
}

pub(super) fn row_id(key: RowKey) -> proto::RowId {
    proto::RowId { request: key.row.request.0, choice: key.row.choice, attempt: key.attempt }
}

/// Reads a plan, and when its new rows stop.
pub(super) fn plan(plan: proto::Plan) -> Result<(Plan, Vec<(RowKey, Stop)>), Bad> {
    let keep = match proto::plan::Keep::try_from(plan.keep) {
        Ok(proto::plan::Keep::Survivors) => Keep::Survivors,
        Ok(proto::plan::Keep::None) => Keep::List(Vec::new()),
        Ok(proto::plan::Keep::List) => Keep::List(plan.keep_rows.into_iter().map(key).collect()),
        _ => return Err(Bad { reason: proto::refused::Reason::Invalid, row: None, field: "keep" }),
    };
    let mut stops = Vec::new();
    let mut add = Vec::new();
    for start in plan.add {
        let row = start.row;
        let bad = |reason, field| Bad { reason, row, field };
        if let Some(field) = unserved(&start) {
            return Err(bad(proto::refused::Reason::Unsupported, field));
        }
        let invalid = |field| bad(proto::refused::Reason::Invalid, field);
        let read = |ids: Option<proto::TokenIds>| token_ids(&ids.unwrap_or_default()).ok();
        let key = key(row.ok_or_else(|| invalid("row"))?);
        let prompt = read(start.prompt_ids).ok_or_else(|| invalid("prompt_ids"))?;
        let output = read(start.output_ids).ok_or_else(|| invalid("output_ids"))?;
        let limits = start.limits.unwrap_or_default();
        if limits.max_tokens as usize <= output.len() {
            return Err(invalid("max_tokens"));
        }
        stops.push((key, Stop { ids: limits.stop_token_ids, min_tokens: limits.min_tokens }));
        add.push(RowStart {
            key,
            slice_no: start.slice_no,
            root: BlockHash(start.hash_root),
            prompt: prompt.into(),
            output,
            max_tokens: Tokens(limits.max_tokens.into()),
            hold_rank: start.hold_rank,
        });
    }
    let plan = Plan {
        no: PlanNo(plan.plan_no),
        base: PlanNo(plan.base_batch),
        keep,
        leave: plan.leave.into_iter().map(key).collect(),
        add,
        steps: plan.steps,
        ceiling: Blocks(plan.ceiling_blocks.into()),
        ranks: plan.hold_ranks.into_iter().filter_map(|hold| Some((key(hold.row?), hold.rank))).collect(),
    };
    Ok((plan, stops))
}

/// The first field whose value is not served; what means "off" is.
fn unserved(start: &proto::RowStart) -> Option<&'static str> {
    let sampling = start.sampling.clone().unwrap_or_default();
    let given = |value: Option<f32>, off: f32| value.is_some_and(|value| value != off);
    let cases = [
        ("adapter", !start.adapter.is_empty()),
        ("deadline_ms_left", start.deadline_ms_left.is_some()),
        ("temperature", !(sampling.temperature.is_finite() && sampling.temperature >= 0.0)),
        ("top_k", sampling.top_k != 0),
        ("top_p", given(sampling.top_p, 1.0)),
        ("min_p", given(sampling.min_p, 0.0)),
        ("repetition_penalty", given(sampling.repetition_penalty, 1.0)),
        ("presence_penalty", given(sampling.presence_penalty, 0.0)),
        ("frequency_penalty", given(sampling.frequency_penalty, 0.0)),
        ("logit_bias", !sampling.logit_bias.is_empty()),
        ("logprobs", sampling.logprobs.is_some()),
    ];
    cases.into_iter().find_map(|(field, refused)| refused.then_some(field))
}

fn hashes(hashes: &[BlockHash]) -> bytes::Bytes {
    hashes.iter().flat_map(|hash| hash.0.to_le_bytes()).collect::<Vec<u8>>().into()
}

fn finish(reason: Option<FinishReason>) -> i32 {
    let reason = match reason {
        None => proto::FinishReason::Unspecified,
        Some(FinishReason::Stop) => proto::FinishReason::Stop,
        Some(FinishReason::Length) => proto::FinishReason::Length,
        Some(FinishReason::Cancelled) => proto::FinishReason::Cancelled,
        Some(FinishReason::Error) => proto::FinishReason::Error,
    };
    reason.into()
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// What the worker says, as a message; `load` as in [`router_sim::SliceWorker::load`].
pub(super) fn says(message: WorkerMessage, steps: &mut u32, load: [u64; 6]) -> Option<Body> {
    Some(match message {
        WorkerMessage::Snapshot { chunk, last, hashes: all } => {
            Body::Snapshot(proto::Snapshot { chunk, last, hashes_le_u64: hashes(&all) })
        }
        WorkerMessage::KvDelta { removed, stored } => {
            Body::KvDelta(proto::KvDelta { stored_le_u64: hashes(&stored), removed_le_u64: hashes(&removed) })
        }
        WorkerMessage::Steps { batch, rows } => {
            *steps += 1;
            let rows = rows.into_iter().map(|row| proto::RowTokens {
                row: Some(row_id(row.key)),
                first_index: row.first_index,
                ids: row.ids,
                logprobs: Vec::new(),
                finish: finish(row.finish),
                cached_tokens: row.cached.map(|cached| narrow(cached.0)),
            });
            Body::Step(proto::Step { batch: batch.0, step: *steps, rows: rows.collect() })
        }
        WorkerMessage::SliceReported(report) => {
            *steps = 0;
            let end = match report.end {
                BatchEnd::Steps => proto::slice_report::End::Steps,
                BatchEnd::AllDone => proto::slice_report::End::AllDone,
                BatchEnd::Cut => proto::slice_report::End::Cut,
                BatchEnd::Backpressure => proto::slice_report::End::Backpressure,
                BatchEnd::Error => proto::slice_report::End::Error,
            };
            let rows = report.rows.into_iter().map(|row| proto::RowReport {
                row: Some(row_id(row.key)),
                computed: narrow(row.computed.0),
                cached: narrow(row.cached.0),
                emitted: narrow(row.emitted.0),
                finish: finish(row.finish),
                kv: if row.held { proto::row_report::Kv::Held } else { proto::row_report::Kv::Dropped }.into(),
                prefill_left: narrow(row.prefill_left.0),
                blocks: 0,
            });
            Body::SliceReport(proto::SliceReport {
                batch: report.batch.0,
                end: end.into(),
                steps: report.steps,
                rows: rows.collect(),
                prefill_us: report.prefill.0,
                decode_us: report.decode.0,
                queue_us: report.idle.0,
                peak_blocks: narrow(report.peak.0),
                next_batch: report.next.map_or(0, |next| next.0),
                error: String::new(),
                idle_us: report.idle.0,
            })
        }
        WorkerMessage::Refused { plan, reason, rows, detail } => {
            let reason = match reason {
                Refusal::Stale => proto::refused::Reason::Stale,
                Refusal::NoMemory => proto::refused::Reason::NoMemory,
                Refusal::TooManyRows => proto::refused::Reason::TooManyRows,
                Refusal::UnknownRow => proto::refused::Reason::UnknownRow,
                Refusal::Unsupported => proto::refused::Reason::Unsupported,
            };
            Body::Refused(proto::Refused {
                plan_no: plan.0,
                reason: reason.into(),
                detail,
                free_blocks: narrow(load[2]),
                held_blocks: narrow(load[4]),
                cached_blocks: narrow(load[5]),
                rows: rows.into_iter().map(row_id).collect(),
            })
        }
        WorkerMessage::Heartbeat => return None,
    })
}
