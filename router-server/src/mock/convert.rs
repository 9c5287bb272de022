//! The worker's side of the contract's messages: plans in, reports out.
//!
//! Everything of a plan that can be checked without the worker's state is checked here and refused by name.

use std::sync::Arc;

use router_core::{
    BatchEnd, BlockHash, Blocks, CostModel, FinishReason, Keep, PaddedCost, Plan, PlanNo, Refusal, RequestId, RowId,
    RowKey, RowReport, RowStart, RowTokens, SliceReport, Tokens, WorkerMessage,
};
use router_sim::{Law, Terms};

use crate::convert::token_ids;
use crate::proto;
use crate::proto::refused::Reason;
use crate::proto::worker_message::Body;
use crate::sampling::fault;

/// A plan or message that is refused.
#[derive(Debug)]
pub struct Refused {
    pub reason: Reason,
    pub detail: String,
    pub rows: Vec<proto::RowId>,
}

fn refuse(reason: Reason, detail: impl Into<String>, rows: &[proto::RowId]) -> Refused {
    Refused { reason, detail: detail.into(), rows: rows.to_vec() }
}

pub fn key(row: Option<&proto::RowId>) -> RowKey {
    let row = row.copied().unwrap_or_default();
    let id = RowId { request: RequestId(row.request), choice: row.choice };
    RowKey { row: id, attempt: row.attempt }
}

pub fn keys(rows: &[proto::RowId]) -> Vec<RowKey> {
    rows.iter().map(|row| key(Some(row))).collect()
}

fn row_id(key: RowKey) -> proto::RowId {
    proto::RowId { request: key.row.request.0, choice: key.row.choice, attempt: key.attempt }
}

/// Reads a plan, with the terms of its new rows.
pub fn plan(plan: &proto::Plan, info: &proto::WorkerInfo) -> Result<(Plan, Vec<(RowKey, Terms)>), Refused> {
    use proto::plan::Keep as Theirs;
    let keep = match Theirs::try_from(plan.keep) {
        Ok(Theirs::Survivors) => Keep::Survivors,
        Ok(Theirs::None) => Keep::List(Vec::new()),
        Ok(Theirs::List) => Keep::List(keys(&plan.keep_rows)),
        Ok(Theirs::Unspecified) | Err(_) => return Err(refuse(Reason::Invalid, "keep", &[])),
    };
    let mut terms = Vec::new();
    let mut add = Vec::new();
    for start in &plan.add {
        let (row, its) = row_start(start, info)?;
        terms.push((row.key, its));
        add.push(row);
    }
    let plan = Plan {
        no: PlanNo(plan.plan_no),
        base: PlanNo(plan.base_batch),
        keep,
        leave: keys(&plan.leave),
        add,
        steps: plan.steps,
        // 0 is no ceiling of the router's.
        ceiling: Blocks(if plan.ceiling_blocks == 0 { u64::MAX } else { plan.ceiling_blocks.into() }),
        ranks: plan.hold_ranks.iter().map(|hold| (key(hold.row.as_ref()), hold.rank)).collect(),
    };
    Ok((plan, terms))
}

fn row_start(start: &proto::RowStart, info: &proto::WorkerInfo) -> Result<(RowStart, Terms), Refused> {
    let row = start.row.unwrap_or_default();
    let limits = start.limits.clone().unwrap_or_default();
    if let Some(field) = unserved(start, info) {
        return Err(refuse(Reason::Unsupported, field, &[row]));
    }
    let ids = |field: &str, ids: Option<&proto::TokenIds>| {
        let ids = ids.map_or_else(|| Ok(Vec::new()), token_ids);
        ids.map_err(|_| refuse(Reason::Invalid, field, &[row]))
    };
    let prompt = ids("prompt_ids", start.prompt_ids.as_ref())?;
    let output = ids("output_ids", start.output_ids.as_ref())?;
    if limits.max_tokens as usize <= output.len() {
        return Err(refuse(Reason::Invalid, "max_tokens: nothing left to draw", &[row]));
    }
    let sampling = start.sampling.clone().unwrap_or_default();
    if let Some((field, message)) = fault(&sampling, &limits, info.vocab_size) {
        return Err(refuse(Reason::Unsupported, format!("{field}: {message}"), &[row]));
    }
    let mut stop_ids = limits.stop_token_ids.clone();
    if !limits.ignore_eos {
        stop_ids.extend(&info.eos_token_ids);
    }
    let start = RowStart {
        key: key(Some(&row)),
        slice_no: start.slice_no,
        root: BlockHash(start.hash_root),
        prompt: Arc::from(prompt),
        output,
        max_tokens: Tokens(limits.max_tokens.into()),
        hold_rank: start.hold_rank,
        prefill_budget: Tokens(start.prefill_budget.into()),
    };
    Ok((start, Terms { stop_ids, min_tokens: limits.min_tokens, logprobs: sampling.logprobs, length: None }))
}

/// The first field that is not served.
fn unserved(start: &proto::RowStart, info: &proto::WorkerInfo) -> Option<&'static str> {
    let fields = [
        ("model", !info.served_names.contains(&start.model)),
        ("adapter", !start.adapter.is_empty()),
        ("deadline_ms_left", start.deadline_ms_left.is_some()),
    ];
    fields.into_iter().find_map(|(field, unserved)| unserved.then_some(field))
}

/// A message of the modelled worker. `step` is the iteration in the batch; `load` what the worker has now.
pub fn body(message: WorkerMessage, step: u32, load: [u64; 6]) -> Body {
    match message {
        WorkerMessage::Snapshot { chunk, last, hashes } => {
            Body::Snapshot(proto::Snapshot { chunk, last, hashes_le_u64: packed(&hashes) })
        }
        WorkerMessage::KvDelta { removed, stored } => {
            Body::KvDelta(proto::KvDelta { stored_le_u64: packed(&stored), removed_le_u64: packed(&removed) })
        }
        WorkerMessage::Steps { batch, rows } => {
            Body::Step(proto::Step { batch: batch.0, step, rows: rows.into_iter().map(row_tokens).collect() })
        }
        WorkerMessage::SliceReported(report) => Body::SliceReport(slice_report(&report)),
        WorkerMessage::Refused { plan, reason, rows, detail } => {
            let reason = match reason {
                Refusal::Stale => Reason::Stale,
                Refusal::NoMemory => Reason::NoMemory,
                Refusal::TooManyRows => Reason::TooManyRows,
                Refusal::UnknownRow => Reason::UnknownRow,
                Refusal::Unsupported => Reason::Unsupported,
            };
            let rows = rows.into_iter().map(row_id).collect();
            refused(plan.0, Refused { reason, detail, rows }, load)
        }
        WorkerMessage::Heartbeat => Body::Pong(proto::Pong::default()),
    }
}

pub fn refused(plan_no: u64, refused: Refused, load: [u64; 6]) -> Body {
    let [_, _, free, _, held, cached] = load.map(narrow);
    Body::Refused(proto::Refused {
        plan_no,
        reason: refused.reason.into(),
        detail: refused.detail,
        free_blocks: free,
        held_blocks: held,
        cached_blocks: cached,
        rows: refused.rows,
    })
}

pub fn load(load: [u64; 6], iterations: u64) -> Body {
    let [running_rows, held_rows, free_blocks, running_blocks, held_blocks, cached_blocks] = load.map(narrow);
    Body::Load(proto::Load {
        running_rows,
        held_rows,
        free_blocks,
        running_blocks,
        held_blocks,
        cached_blocks,
        iterations,
    })
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn packed(hashes: &[BlockHash]) -> bytes::Bytes {
    hashes.iter().flat_map(|hash| hash.0.to_le_bytes()).collect::<Vec<u8>>().into()
}

fn finish(reason: Option<FinishReason>) -> i32 {
    use proto::FinishReason as Theirs;
    let reason = match reason {
        None => Theirs::Unspecified,
        Some(FinishReason::Stop) => Theirs::Stop,
        Some(FinishReason::Length) => Theirs::Length,
        Some(FinishReason::Cancelled) => Theirs::Cancelled,
        Some(FinishReason::Error) => Theirs::Error,
    };
    reason.into()
}

fn row_tokens(row: RowTokens) -> proto::RowTokens {
    proto::RowTokens {
        row: Some(row_id(row.key)),
        first_index: row.first_index,
        ids: row.ids,
        logprobs: row.logprobs.iter().map(crate::convert::logprobs).collect(),
        finish: finish(row.finish),
        cached_tokens: row.cached.map(|cached| narrow(cached.0)),
    }
}

fn slice_report(report: &SliceReport) -> proto::SliceReport {
    use proto::slice_report::End;
    let end = match report.end {
        BatchEnd::Steps => End::Steps,
        BatchEnd::AllDone => End::AllDone,
        BatchEnd::Cut => End::Cut,
        BatchEnd::Backpressure => End::Backpressure,
        BatchEnd::Error => End::Error,
    };
    proto::SliceReport {
        batch: report.batch.0,
        end: end.into(),
        steps: report.steps,
        rows: report.rows.iter().map(row_report).collect(),
        prefill_us: report.prefill.0,
        decode_us: report.decode.0,
        queue_us: 0,
        peak_blocks: narrow(report.peak.0),
        next_batch: report.next.map_or(0, |next| next.0),
        error: String::new(),
        idle_us: report.idle.0,
        pad_tokens: report.pad.0,
        invalid_tokens: report.invalid.0,
    }
}

fn row_report(row: &RowReport) -> proto::RowReport {
    use proto::row_report::Kv;
    proto::RowReport {
        row: Some(row_id(row.key)),
        computed: narrow(row.computed.0),
        cached: narrow(row.cached.0),
        emitted: narrow(row.emitted.0),
        finish: finish(row.finish),
        kv: if row.held { Kv::Held } else { Kv::Dropped }.into(),
        prefill_left: narrow(row.prefill_left.0),
        // The modelled worker does not say.
        blocks: 0,
    }
}

/// What its iterations take, exactly; no form where the law is none that a model can have.
pub fn cost_model(law: &Law) -> proto::CostModel {
    use proto::cost_model::Form;
    let padded = |cost: &PaddedCost| proto::PaddedCost {
        constant_s: cost.constant,
        per_row_s: cost.per_row,
        per_position_s: cost.per_position,
        per_cell_s: cost.per_cell,
    };
    let form = match law {
        Law::Linear(CostModel::Padded { prefill, step }) => {
            Form::Padded(proto::PaddedCostModel { prefill: Some(padded(prefill)), step: Some(padded(step)) })
        }
        Law::Linear(CostModel::Paged { prefill, step }) => Form::Paged(proto::PagedCostModel {
            prefill_constant_s: prefill.constant,
            prefill_per_token_s: prefill.per_token,
            prefill_per_pair_s: prefill.per_pair,
            step_constant_s: step.constant,
            step_per_row_s: step.per_row,
            step_per_context_token_s: step.per_context,
        }),
        Law::Norm(_) => return proto::CostModel::default(),
    };
    proto::CostModel { form: Some(form), r2: 1.0, ..proto::CostModel::default() }
}

#[cfg(test)]
mod tests {
    use router_core::TokenLogprobs;

    use super::*;
    use crate::convert;

    #[test]
    fn what_the_mock_says_the_router_understands() {
        let key = RowKey { row: RowId { request: RequestId(3), choice: 0 }, attempt: 2 };
        let said = WorkerMessage::Steps {
            batch: PlanNo(4),
            rows: vec![RowTokens {
                key,
                first_index: 7,
                ids: vec![9],
                logprobs: vec![TokenLogprobs { chosen: -0.5, top: vec![(9, -0.5), (8, -1.0)] }],
                finish: Some(FinishReason::Stop),
                cached: Some(Tokens(16)),
            }],
        };
        let Ok(convert::Heard::Message(WorkerMessage::Steps { batch, rows })) =
            convert::heard(body(said, 1, [0; 6]), 100)
        else {
            panic!("not understood");
        };
        assert_eq!((batch, rows[0].key, rows[0].first_index), (PlanNo(4), key, 7));
        assert_eq!(rows[0].logprobs, [TokenLogprobs { chosen: -0.5, top: vec![(9, -0.5), (8, -1.0)] }]);
        assert_eq!((rows[0].finish, rows[0].cached), (Some(FinishReason::Stop), Some(Tokens(16))));
    }
}
