//! Between the contract's messages and the core's types.
//!
//! What a worker sends is checked here, once: after this module every id exists, every enum value is known and every
//! length makes sense. Nothing in it panics, whatever the bytes.

use bytes::Bytes;
use router_core::{
    BatchEnd, BlockHash, BlockSize, Blocks, CostModel, Decision, Epoch, FinishReason, Iteration, Keep, Layout, Micros,
    ModelSpec, PaddedCost, PagedPrefill, PagedStep, Plan, PlanNo, Refusal, RequestId, RowId, RowKey, RowReport,
    RowStart, RowTokens, Sighting, SliceReport, TokenLogprobs, Tokens, WorkerId, WorkerMessage, WorkerSpec,
};

use crate::proto;
use crate::proto::router_message::Body as ToWorker;
use crate::proto::worker_message::Body as FromWorker;
use crate::sampling::MOST_LOGPROBS;

/// Longest name of a worker or model.
const MOST_NAME: usize = 256;
/// Most names a worker may serve.
const MOST_NAMES: usize = 256;
/// Longest text of a worker that goes on to a client or a log, in characters.
const MOST_TEXT: usize = 500;
/// Most microseconds or tokens that a report of one batch may name: two years of time.
const MOST_REPORTED: u64 = 1 << 46;
/// What a worker says to the owner that it is taken from.
const TAKEN: &str = "another owner";

/// A worker's text, cut where it is too long.
pub fn clipped(text: &str) -> String {
    match text.char_indices().nth(MOST_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A message that cannot be true: the link is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Hostile(String);

fn hostile<T>(what: impl Into<String>) -> Result<T, Hostile> {
    Err(Hostile(what.into()))
}

/// What a worker's message means for the link.
#[derive(Clone, Debug)]
pub enum Heard {
    /// For the core.
    Message(WorkerMessage),
    /// The session is over.
    Goodbye(String),
    /// Another router owns the worker, or has just taken it.
    NotOwner(String),
}

/// Checks what a worker announces.
pub fn worker_spec(info: &proto::WorkerInfo) -> Result<WorkerSpec, Hostile> {
    let name = |name: &str, what: &str| match name.len() {
        1..=MOST_NAME if !name.chars().any(char::is_control) => Ok(()),
        length => hostile(format!("{what} is not a name: {length} bytes")),
    };
    name(&info.worker_id, "worker_id")?;
    if info.served_names.is_empty() {
        return hostile("served_names is empty");
    }
    info.served_names.iter().try_for_each(|served| name(served, "served name"))?;
    if info.served_names.len() > MOST_NAMES {
        return hostile(format!("too many served names: {}", info.served_names.len()));
    }
    let texts = [&info.model_digest, &info.tokenizer_digest, &info.device, &info.dtype, &info.engine];
    if let Some(text) = texts.iter().find(|text| text.len() > MOST_NAME) {
        return hostile(format!("a text of its announcement has {} bytes: {}", text.len(), clipped(text)));
    }
    let zero = [
        ("vocab_size", info.vocab_size),
        ("max_context", info.max_context),
        ("blocks", info.blocks),
        ("max_rows", info.max_rows),
    ];
    if let Some((what, _)) = zero.iter().find(|(_, value)| *value == 0) {
        return hostile(format!("{what} is 0"));
    }
    let Some(block_size) = BlockSize::new(info.block_size) else {
        return hostile("block_size is 0");
    };
    let layout = layout(info.cost_shape);
    let cost = info.cost_model.as_ref().map(cost_model).transpose()?.flatten();
    if let Some(cost) = cost.filter(|cost| cost.layout() != layout) {
        return hostile(format!("cost_model is {:?} and cost_shape is {layout:?}", cost.layout()));
    }
    Ok(WorkerSpec {
        name: info.worker_id.clone(),
        epoch: Epoch(info.worker_epoch),
        model: ModelSpec {
            digest: info.model_digest.clone(),
            tokenizer: info.tokenizer_digest.clone(),
            block_size,
            vocab: info.vocab_size,
        },
        blocks: Blocks(info.blocks.into()),
        max_rows: info.max_rows,
        max_context: Tokens(info.max_context.into()),
        chunk: Tokens(info.chunk_tokens.into()),
        layout,
        cost,
    })
}

fn layout(shape: i32) -> Layout {
    match proto::CostShape::try_from(shape) {
        Ok(proto::CostShape::Padded) => Layout::Padded,
        // a later contract's shape is not padded: what pads says so
        _ => Layout::Paged,
    }
}

/// `None` where the message holds no model, or one in which nothing takes time: that says nothing either.
fn cost_model(model: &proto::CostModel) -> Result<Option<CostModel>, Hostile> {
    use proto::cost_model::Form;
    let padded = |cost: Option<proto::PaddedCost>, what: &str| {
        let Some(cost) = cost else { return hostile(format!("cost_model.padded.{what} is missing")) };
        Ok(PaddedCost {
            constant: cost.constant_s,
            per_row: cost.per_row_s,
            per_position: cost.per_position_s,
            per_cell: cost.per_cell_s,
        })
    };
    let Some(form) = &model.form else { return Ok(None) };
    let model = match form {
        Form::Padded(form) => {
            CostModel::Padded { prefill: padded(form.prefill, "prefill")?, step: padded(form.step, "step")? }
        }
        Form::Paged(form) => CostModel::Paged {
            prefill: PagedPrefill {
                constant: form.prefill_constant_s,
                per_token: form.prefill_per_token_s,
                per_pair: form.prefill_per_pair_s,
            },
            step: PagedStep {
                constant: form.step_constant_s,
                per_row: form.step_per_row_s,
                per_context: form.step_per_context_token_s,
            },
        },
    };
    model.check().map_err(|error| Hostile(format!("cost_model: {error}")))?;
    // All are finite and not negative: an iteration of everything is at least as long as any.
    let everything = Iteration { rows: 1, context: 1, longest: 1, prefill: 1, pairs: 1 };
    let decode = Iteration { prefill: 0, ..everything };
    Ok(Some(model).filter(|model| model.iteration(&everything) + model.iteration(&decode) > 0.0))
}

/// Checks and converts one message of a session; ids must be below `vocab`.
pub fn heard(body: FromWorker, vocab: u32) -> Result<Heard, Hostile> {
    Ok(Heard::Message(match body {
        FromWorker::Snapshot(snapshot) => WorkerMessage::Snapshot {
            chunk: snapshot.chunk,
            last: snapshot.last,
            hashes: hashes(&snapshot.hashes_le_u64)?,
        },
        FromWorker::KvDelta(delta) => {
            WorkerMessage::KvDelta { removed: hashes(&delta.removed_le_u64)?, stored: hashes(&delta.stored_le_u64)? }
        }
        FromWorker::Step(step) => WorkerMessage::Steps {
            batch: PlanNo(step.batch),
            rows: step.rows.into_iter().map(|row| row_tokens(row, vocab)).collect::<Result<_, _>>()?,
        },
        FromWorker::SliceReport(report) => WorkerMessage::SliceReported(slice_report(report)?),
        FromWorker::Refused(refused) => return refusal(refused),
        FromWorker::Load(_) | FromWorker::Pong(_) => WorkerMessage::Heartbeat,
        FromWorker::Goodbye(goodbye) if goodbye.reason.starts_with(TAKEN) => {
            return Ok(Heard::NotOwner(clipped(&goodbye.reason)));
        }
        FromWorker::Goodbye(goodbye) => return Ok(Heard::Goodbye(clipped(&goodbye.reason))),
    }))
}

fn hashes(bytes: &Bytes) -> Result<Vec<BlockHash>, Hostile> {
    let (whole, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return hostile(format!("{} bytes of hashes are not whole hashes", bytes.len()));
    }
    Ok(whole.iter().map(|hash| BlockHash(u64::from_le_bytes(*hash))).collect())
}

/// Reads packed ids.
pub fn token_ids(ids: &proto::TokenIds) -> Result<Vec<u32>, Hostile> {
    let (whole, rest) = ids.le_u32.as_chunks::<4>();
    if !rest.is_empty() {
        return hostile(format!("{} bytes of ids are not whole ids", ids.le_u32.len()));
    }
    Ok(whole.iter().map(|id| u32::from_le_bytes(*id)).collect())
}

/// Packs ids.
pub fn packed(ids: &[u32]) -> proto::TokenIds {
    proto::TokenIds { le_u32: ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>().into() }
}

fn key(row: Option<proto::RowId>) -> Result<RowKey, Hostile> {
    let Some(row) = row else {
        return hostile("a row has no id");
    };
    let id = RowId { request: RequestId(row.request), choice: row.choice };
    Ok(RowKey { row: id, attempt: row.attempt })
}

fn finish(value: i32) -> Result<Option<FinishReason>, Hostile> {
    use proto::FinishReason as Theirs;
    Ok(match Theirs::try_from(value) {
        Ok(Theirs::Unspecified) => None,
        Ok(Theirs::Stop) => Some(FinishReason::Stop),
        Ok(Theirs::Length) => Some(FinishReason::Length),
        Ok(Theirs::Cancelled) => Some(FinishReason::Cancelled),
        Ok(Theirs::Error) => Some(FinishReason::Error),
        Err(_) => return hostile(format!("unknown finish reason: {value}")),
    })
}

fn row_tokens(row: proto::RowTokens, vocab: u32) -> Result<RowTokens, Hostile> {
    if let Some(id) = row.ids.iter().find(|id| **id >= vocab) {
        return hostile(format!("a token that does not exist: {id}\nthe vocabulary has {vocab}"));
    }
    let count = u32::try_from(row.ids.len()).ok().and_then(|count| row.first_index.checked_add(count));
    if count.is_none() {
        return hostile(format!("{} ids at index {} pass all indices", row.ids.len(), row.first_index));
    }
    if !row.logprobs.is_empty() && row.logprobs.len() != row.ids.len() {
        return hostile(format!("{} ids have {} logprobs", row.ids.len(), row.logprobs.len()));
    }
    Ok(RowTokens {
        key: key(row.row)?,
        first_index: row.first_index,
        logprobs: row.logprobs.into_iter().map(|logprobs| token_logprobs(logprobs, vocab)).collect::<Result<_, _>>()?,
        finish: finish(row.finish)?,
        cached: row.cached_tokens.map(|cached| Tokens(cached.into())),
        ids: row.ids,
    })
}

fn token_logprobs(logprobs: proto::TokenLogprobs, vocab: u32) -> Result<TokenLogprobs, Hostile> {
    let (ids, top) = (logprobs.top_ids, logprobs.top);
    if ids.len() != top.len() || ids.len() > MOST_LOGPROBS as usize || ids.iter().any(|id| *id >= vocab) {
        return hostile(format!("{} most likely ids with {} logprobs, of {vocab} ids", ids.len(), top.len()));
    }
    Ok(TokenLogprobs { chosen: logprobs.chosen, top: ids.into_iter().zip(top).collect() })
}

/// Logprobs of one token as a message.
pub fn logprobs(logprobs: &TokenLogprobs) -> proto::TokenLogprobs {
    let (top_ids, top) = logprobs.top.iter().copied().unzip();
    proto::TokenLogprobs { chosen: logprobs.chosen, top_ids, top }
}

fn slice_report(report: proto::SliceReport) -> Result<SliceReport, Hostile> {
    use proto::slice_report::End;
    let end = match End::try_from(report.end) {
        Ok(End::Steps) => BatchEnd::Steps,
        Ok(End::AllDone) => BatchEnd::AllDone,
        Ok(End::Cut) => BatchEnd::Cut,
        Ok(End::Backpressure) => BatchEnd::Backpressure,
        Ok(End::Error) => BatchEnd::Error,
        Ok(End::Unspecified) | Err(_) => return hostile(format!("unknown end of a batch: {}", report.end)),
    };
    let huge = [
        ("prefill_us", report.prefill_us),
        ("decode_us", report.decode_us),
        ("idle_us", report.idle_us),
        ("pad_tokens", report.pad_tokens),
        ("invalid_tokens", report.invalid_tokens),
    ];
    if let Some((what, value)) = huge.into_iter().find(|(_, value)| *value > MOST_REPORTED) {
        return hostile(format!("a report's {what} is {value}"));
    }
    let rows = report.rows.into_iter().map(|row| {
        use proto::row_report::Kv;
        let held = match Kv::try_from(row.kv) {
            Ok(Kv::Held) => true,
            Ok(Kv::Dropped | Kv::Unspecified) => false,
            Err(_) => return hostile(format!("unknown KV state: {}", row.kv)),
        };
        Ok(RowReport {
            key: key(row.row)?,
            computed: Tokens(row.computed.into()),
            cached: Tokens(row.cached.into()),
            emitted: Tokens(row.emitted.into()),
            finish: finish(row.finish)?,
            held,
            prefill_left: Tokens(row.prefill_left.into()),
        })
    });
    Ok(SliceReport {
        batch: PlanNo(report.batch),
        end,
        next: Some(PlanNo(report.next_batch)).filter(|next| next.0 != 0),
        steps: report.steps,
        prefill: Micros(report.prefill_us),
        decode: Micros(report.decode_us),
        peak: Blocks(report.peak_blocks.into()),
        idle: Micros(report.idle_us),
        pad: Tokens(report.pad_tokens),
        invalid: Tokens(report.invalid_tokens),
        rows: rows.collect::<Result<_, _>>()?,
    })
}

fn refusal(refused: proto::Refused) -> Result<Heard, Hostile> {
    use proto::refused::Reason;
    let reason = match Reason::try_from(refused.reason) {
        Ok(Reason::Stale) => Refusal::Stale,
        Ok(Reason::NoMemory) => Refusal::NoMemory,
        Ok(Reason::TooManyRows) => Refusal::TooManyRows,
        Ok(Reason::UnknownRow) => Refusal::UnknownRow,
        Ok(Reason::Unsupported | Reason::Invalid) => Refusal::Unsupported,
        Ok(Reason::NotOwner) => return Ok(Heard::NotOwner(clipped(&refused.detail))),
        Ok(Reason::Unspecified) | Err(_) => return hostile(format!("unknown refusal: {}", refused.reason)),
    };
    Ok(Heard::Message(WorkerMessage::Refused {
        plan: PlanNo(refused.plan_no),
        reason,
        rows: refused.rows.into_iter().map(|row| key(Some(row))).collect::<Result<_, _>>()?,
        detail: clipped(&refused.detail),
    }))
}

fn row_id(key: RowKey) -> proto::RowId {
    proto::RowId { request: key.row.request.0, choice: key.row.choice, attempt: key.attempt }
}

fn row_ids(keys: &[RowKey]) -> Vec<proto::RowId> {
    keys.iter().copied().map(row_id).collect()
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// What the shell adds to a row: the core knows no text, no sampling, no stop tokens.
#[derive(Clone, Debug)]
pub struct RowExtras {
    /// How tokens are drawn.
    pub sampling: proto::Sampling,
    /// When the row ends; `max_tokens` is the core's.
    pub limits: proto::Limits,
    /// The name it was asked for by.
    pub model: String,
    /// The client's trace, as W3C writes it; empty without one.
    pub traceparent: String,
}

/// A plan of the core as a message. `extras` finds what the shell knows of a request; a row without it is left out,
/// which only a bug could cause.
pub fn plan<'a>(plan: Plan, extras: impl Fn(RequestId) -> Option<&'a RowExtras>) -> ToWorker {
    use proto::plan::Keep as Theirs;
    let (keep, keep_rows) = match plan.keep {
        Keep::Survivors => (Theirs::Survivors, Vec::new()),
        Keep::List(rows) if rows.is_empty() => (Theirs::None, Vec::new()),
        Keep::List(rows) => (Theirs::List, row_ids(&rows)),
    };
    let add = plan.add.into_iter().filter_map(|row| {
        let extras = extras(row.key.row.request)?;
        Some(row_start(&row, extras))
    });
    ToWorker::Plan(proto::Plan {
        plan_no: plan.no.0,
        base_batch: plan.base.0,
        keep: keep.into(),
        keep_rows,
        add: add.collect(),
        leave: row_ids(&plan.leave),
        steps: plan.steps,
        ceiling_blocks: narrow(plan.ceiling.0),
        hold_ranks: plan
            .ranks
            .into_iter()
            .map(|(row, rank)| proto::HoldRank { row: Some(row_id(row)), rank })
            .collect(),
    })
}

fn row_start(row: &RowStart, extras: &RowExtras) -> proto::RowStart {
    let limits = proto::Limits { max_tokens: narrow(row.max_tokens.0), ..extras.limits.clone() };
    // Choices differ by their seeds alone; the first has the request's own.
    let seed = extras.sampling.seed.wrapping_add(row.key.row.choice.into());
    proto::RowStart {
        row: Some(row_id(row.key)),
        slice_no: row.slice_no,
        model: extras.model.clone(),
        adapter: String::new(),
        hash_root: row.root.0,
        prompt_ids: Some(packed(&row.prompt)),
        output_ids: Some(packed(&row.output)),
        sampling: Some(proto::Sampling { seed, ..extras.sampling.clone() }),
        limits: Some(limits),
        hold_rank: row.hold_rank,
        deadline_ms_left: None,
        traceparent: extras.traceparent.clone(),
        prefill_budget: narrow(row.prefill_budget.0),
    }
}

/// A cut as a message: at the next step boundary.
pub fn cut(batch: PlanNo) -> ToWorker {
    ToWorker::Cut(proto::Cut { batch: batch.0, after_step: None })
}

/// A release of held KV as a message.
pub fn release_kv(rows: &[RowKey]) -> ToWorker {
    ToWorker::ReleaseKv(proto::ReleaseKv { rows: row_ids(rows) })
}

/// A drop of rows as a message.
pub fn drop_rows(rows: &[RowKey]) -> ToWorker {
    ToWorker::Drop(proto::Drop { rows: row_ids(rows) })
}

/// A decision as a message; `name` gives the names of workers.
pub fn decision(decision: &Decision, name: impl Fn(WorkerId) -> String) -> proto::Decision {
    let candidates = decision.candidates.iter().zip(&decision.scores);
    proto::Decision {
        decision_id: decision.id.0,
        request: decision.row.map_or(0, |row| row.request.0),
        choice: decision.row.map_or(0, |row| row.choice),
        worker_id: name(decision.worker),
        policy: decision.policy.to_string(),
        turn: decision.turn,
        prompt_tokens: narrow(decision.tokens.0),
        seed: decision.seed,
        arrivals: decision.anticipation.arrivals,
        prefill_time: decision.anticipation.prefill,
        hotspot: decision.guard.map(hotspot),
        candidates: candidates
            .map(|(candidate, score)| proto::CandidateScore {
                worker_id: name(candidate.worker),
                new_tokens: candidate.new_tokens.0,
                queued_tokens: candidate.queued.0,
                batch_size: candidate.batch_size,
                work_us: candidate.work.0,
                free_blocks: candidate.free.0,
                score_high: (score >> 64) as u64,
                score_low: *score as u64,
                joined_us: candidate.joined.0,
                filtered: candidate.filtered,
            })
            .collect(),
    }
}

fn hotspot(sighting: Sighting) -> proto::Hotspot {
    proto::Hotspot {
        block_hash: sighting.class.0,
        blocks: sighting.depth.0,
        requests: sighting.requests,
        window: sighting.window,
        workers: sighting.workers,
        holders: sighting.holders,
        alarm: sighting.alarm,
        preferred: sighting.preferred,
        filtered: sighting.filtered,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    type Breaks = fn(&mut proto::WorkerInfo);

    fn info() -> proto::WorkerInfo {
        proto::WorkerInfo {
            worker_id: "w0".into(),
            worker_epoch: 7,
            model_digest: "m".into(),
            served_names: vec!["tiny".into()],
            vocab_size: 100,
            max_context: 128,
            block_size: 16,
            blocks: 8,
            max_rows: 4,
            ..Default::default()
        }
    }

    fn is_message(body: FromWorker) -> bool {
        matches!(heard(body, 100), Ok(Heard::Message(_)))
    }

    #[test]
    fn a_decision_tells_what_the_guard_saw() {
        let candidate = |slot: u32| router_core::Candidate {
            worker: WorkerId(slot),
            filtered: slot == 1,
            ..router_core::Candidate::default()
        };
        let sighting = Sighting {
            class: BlockHash(9),
            depth: Blocks(8),
            requests: 7,
            window: 6,
            workers: 5,
            holders: 4,
            alarm: true,
            preferred: false,
            filtered: true,
        };
        let decided = Decision {
            id: router_core::DecisionId(1),
            at: Micros(2),
            row: None,
            tokens: Tokens(3),
            policy: router_core::PolicyName::ProductAnticipating,
            seed: 4,
            turn: 5,
            anticipation: router_core::Anticipation { arrivals: 6, prefill: 7 },
            guard: Some(sighting),
            candidates: vec![candidate(0), candidate(1)],
            scores: vec![1 << 100, 2],
            worker: WorkerId(0),
        };
        let said = decision(&decided, |worker| worker.0.to_string());
        let hotspot = proto::Hotspot {
            block_hash: 9,
            blocks: 8,
            requests: 7,
            window: 6,
            workers: 5,
            holders: 4,
            alarm: true,
            preferred: false,
            filtered: true,
        };
        assert_eq!((said.hotspot, said.arrivals, said.prefill_time), (Some(hotspot), 6, 7));
        assert_eq!(said.candidates.iter().map(|one| one.filtered).collect::<Vec<_>>(), [false, true]);
        assert_eq!((said.candidates[0].score_high, said.candidates[0].score_low), (1 << 36, 0));
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(clipped("é"), "é");
        assert_eq!(clipped(&"é".repeat(501)).chars().count(), 501);
    }

    #[test]
    fn an_announcement_is_checked() {
        assert_eq!(worker_spec(&info()).expect("valid").most_tokens(), Tokens(128));
        let broken: [(&str, Breaks); 7] = [
            ("block_size", |info| info.block_size = 0),
            ("blocks", |info| info.blocks = 0),
            ("vocab_size", |info| info.vocab_size = 0),
            ("max_rows", |info| info.max_rows = 0),
            ("served_names", |info| info.served_names.clear()),
            ("worker_id", |info| info.worker_id = "a\nb".into()),
            ("worker_id", |info| info.worker_id = "x".repeat(1000)),
        ];
        for (what, breaks) in broken {
            let mut info = info();
            breaks(&mut info);
            let error = worker_spec(&info).expect_err(what);
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    fn paged(step: f64, token: f64) -> proto::CostModel {
        let form = proto::PagedCostModel {
            step_constant_s: step,
            prefill_per_token_s: token,
            ..proto::PagedCostModel::default()
        };
        proto::CostModel { form: Some(proto::cost_model::Form::Paged(form)), ..proto::CostModel::default() }
    }

    fn padded(prefill: Option<f64>, step: Option<f64>) -> proto::CostModel {
        let cost = |constant_s| proto::PaddedCost { constant_s, ..proto::PaddedCost::default() };
        let form = proto::PaddedCostModel { prefill: prefill.map(cost), step: step.map(cost) };
        proto::CostModel { form: Some(proto::cost_model::Form::Padded(form)), ..proto::CostModel::default() }
    }

    #[test]
    fn a_cost_model_is_checked() {
        use proto::CostShape::{Padded, Paged, Unspecified};
        let spec = |model: proto::CostModel, shape: proto::CostShape| {
            worker_spec(&proto::WorkerInfo { cost_model: Some(model), cost_shape: shape.into(), ..info() })
        };
        assert_eq!(worker_spec(&info()).expect("valid").cost, None);
        assert_eq!(spec(proto::CostModel::default(), Paged).expect("no form").cost, None);
        assert_eq!(spec(paged(0.0, 0.0), Paged).expect("nothing takes time").cost, None);
        assert_eq!(spec(padded(Some(0.0), Some(0.0)), Padded).expect("nothing takes time").cost, None);
        for (model, shape) in [(paged(1e-3, 0.0), Paged), (paged(0.0, 1e-5), Unspecified), (paged(8e4, 1e-300), Paged)]
        {
            let spec = spec(model, shape).expect("valid");
            assert_eq!((spec.layout, spec.cost.map(|cost| cost.layout())), (Layout::Paged, Some(Layout::Paged)));
        }
        let both = spec(padded(Some(2.0), Some(1.0)), Padded).expect("valid");
        let Some(CostModel::Padded { prefill, step }) = both.cost else { panic!("{both:?}") };
        assert_eq!((both.layout, prefill.constant, step.constant), (Layout::Padded, 2.0, 1.0));
        for (model, shape, field) in [
            (paged(-1e-9, 0.0), Paged, "step.constant"),
            (paged(f64::NAN, 0.0), Paged, "step.constant"),
            (paged(1e300, 0.0), Paged, "step.constant"),
            (paged(1e-3, f64::INFINITY), Paged, "prefill.per_token"),
            (padded(Some(f64::NEG_INFINITY), Some(1.0)), Padded, "prefill.constant"),
            (padded(Some(1.0), Some(f64::NAN)), Padded, "step.constant"),
            (padded(None, Some(1.0)), Padded, "prefill is missing"),
            (padded(Some(1.0), None), Padded, "step is missing"),
            (paged(1e-3, 0.0), Padded, "cost_shape"),
            (padded(Some(1.0), Some(1.0)), Paged, "cost_shape"),
            (padded(Some(1.0), Some(1.0)), Unspecified, "cost_shape"),
        ] {
            let error = spec(model, shape).expect_err(field).to_string();
            assert!(error.starts_with("cost_model") && error.contains(field), "{error}");
        }
    }

    #[test]
    fn hostile_messages_are_refused() {
        let row = Some(proto::RowId { request: 1, choice: 0, attempt: 0 });
        let step = |row: proto::RowTokens| FromWorker::Step(proto::Step { batch: 1, step: 1, rows: vec![row] });
        assert!(is_message(step(proto::RowTokens { row, ids: vec![99], ..Default::default() })));
        assert!(!is_message(step(proto::RowTokens { row, ids: vec![100], ..Default::default() })));
        assert!(!is_message(step(proto::RowTokens { row: None, ids: vec![1], ..Default::default() })));
        assert!(!is_message(step(proto::RowTokens { row, finish: 77, ..Default::default() })));
        let with = |logprobs: &[(Vec<u32>, Vec<f32>)]| {
            let of = |(top_ids, top): &(Vec<u32>, Vec<f32>)| proto::TokenLogprobs {
                chosen: -1.0,
                top_ids: top_ids.clone(),
                top: top.clone(),
            };
            let logprobs = logprobs.iter().map(of).collect();
            step(proto::RowTokens { row, ids: vec![1, 2], logprobs, ..Default::default() })
        };
        assert!(is_message(with(&[])));
        assert!(is_message(with(&[(vec![1, 99], vec![-1.0, f32::NEG_INFINITY]), (vec![], vec![])])));
        assert!(!is_message(with(&[(vec![], vec![])])), "one for two ids");
        assert!(!is_message(with(&[(vec![1], vec![]), (vec![], vec![])])));
        assert!(!is_message(with(&[(vec![100], vec![-1.0]), (vec![], vec![])])));
        assert!(!is_message(with(&[(vec![1; 21], vec![-1.0; 21]), (vec![], vec![])])));
        let late = proto::RowTokens { row, first_index: u32::MAX, ids: vec![1], ..Default::default() };
        assert!(!is_message(step(late)));
        let delta = |bytes: usize| {
            FromWorker::KvDelta(proto::KvDelta { stored_le_u64: vec![0; bytes].into(), ..Default::default() })
        };
        assert!(is_message(delta(16)));
        assert!(!is_message(delta(15)));
        assert!(!is_message(FromWorker::SliceReport(proto::SliceReport::default())));
        assert!(!is_message(FromWorker::Refused(proto::Refused { reason: 50, ..Default::default() })));
    }

    #[test]
    fn a_plan_carries_what_the_shell_knows() {
        let row = |request, choice| RowStart {
            key: RowKey { row: RowId { request: RequestId(request), choice }, attempt: 3 },
            slice_no: 1,
            root: BlockHash(9),
            prompt: Arc::from([1, 2]),
            output: vec![3],
            max_tokens: Tokens(50),
            hold_rank: 4,
            prefill_budget: Tokens(0),
        };
        let core = Plan {
            no: PlanNo(2),
            base: PlanNo(1),
            keep: Keep::List(vec![]),
            leave: vec![],
            add: vec![row(1, 0), row(2, 0), row(1, 3)],
            steps: 32,
            ceiling: Blocks(5),
            ranks: vec![],
        };
        let extras = RowExtras {
            sampling: proto::Sampling { temperature: 0.5, seed: u64::MAX, ..Default::default() },
            limits: proto::Limits { min_tokens: 2, ignore_eos: true, stop_token_ids: vec![8], max_tokens: 0 },
            model: "tiny".into(),
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        };
        let ToWorker::Plan(sent) = plan(core, |request| (request.0 == 1).then_some(&extras)) else {
            panic!("not a plan");
        };
        assert_eq!(sent.keep, proto::plan::Keep::None as i32);
        assert_eq!(sent.add.len(), 2, "a row nobody knows is left out");
        let row = &sent.add[0];
        assert_eq!(row.limits, Some(proto::Limits { max_tokens: 50, ..extras.limits }));
        let seeds: Vec<_> = sent.add.iter().flat_map(|row| &row.sampling).map(|sampling| sampling.seed).collect();
        assert_eq!(seeds, [u64::MAX, 2], "choices draw apart");
        assert_eq!(token_ids(row.prompt_ids.as_ref().expect("ids")).expect("whole"), [1, 2]);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(proto::WorkerMessage { body: Some(body), .. }) = proto::WorkerMessage::decode(&bytes[..]) {
                let _ = heard(body, 100);
            }
        }
    }
}
