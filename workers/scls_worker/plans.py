"""Plans as they arrive: everything about a plan that can be checked before its base has ended.

Turns a message into a `Plan` of checked values, or raises `Refusal`. Does not know which rows the worker holds, nor its
memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scls_router.proto import common_pb2 as common
from scls_router.proto import worker_pb2 as pb

from .rows import Draw, Row, RowKey

# Rows of a list that is too long are not all named back.
MOST_ROWS_NAMED = 64
# Of the contract.
MOST_LOGPROBS = 20


class Refusal(Exception):
    def __init__(self, reason: pb.Refused.Reason, detail: str = "", rows: Iterable[RowKey] = ()) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.rows = list(rows)[:MOST_ROWS_NAMED]


@dataclass(slots=True)
class Plan:
    number: int
    base: int
    keep: pb.Plan.Keep
    keep_rows: list[RowKey]
    add: list[Row]
    leave: frozenset[RowKey]
    steps: int
    ceiling_blocks: int
    hold_ranks: dict[RowKey, int]
    arrived_us: int

    def forget(self, keys: frozenset[RowKey]) -> None:
        """Rows that were dropped before the plan started."""
        self.add = [row for row in self.add if row.key not in keys]
        self.keep_rows = [key for key in self.keep_rows if key not in keys]


def read_plan(plan: pb.Plan, info: common.WorkerInfo, now_us: int) -> Plan:
    if plan.keep not in (pb.Plan.KEEP_SURVIVORS, pb.Plan.KEEP_NONE, pb.Plan.KEEP_LIST):
        raise Refusal(pb.Refused.REASON_INVALID, "keep")
    if plan.steps == 0:
        raise Refusal(pb.Refused.REASON_INVALID, "steps")
    if len(plan.add) > info.max_rows:
        raise Refusal(pb.Refused.REASON_TOO_MANY_ROWS, f"max_rows: {info.max_rows}")
    add = [read_row(start, info) for start in plan.add]
    keys = {row.key for row in add}
    keep_rows = list(dict.fromkeys(RowKey.of(row) for row in plan.keep_rows))
    if len(keys) < len(add):
        raise Refusal(pb.Refused.REASON_INVALID, "add: a row twice")
    if not keys.isdisjoint(keep_rows):
        raise Refusal(pb.Refused.REASON_INVALID, "add: a row that is kept too", keys.intersection(keep_rows))
    return Plan(
        number=plan.plan_no,
        base=plan.base_batch,
        keep=plan.keep,
        keep_rows=keep_rows,
        add=add,
        leave=frozenset(RowKey.of(row) for row in plan.leave),
        steps=plan.steps,
        ceiling_blocks=plan.ceiling_blocks,
        hold_ranks={RowKey.of(hold.row): hold.rank for hold in plan.hold_ranks},
        arrived_us=now_us,
    )


def read_row(start: pb.RowStart, info: common.WorkerInfo) -> Row:
    key = RowKey.of(start.row)

    def refuse(reason: pb.Refused.Reason, field: str) -> Refusal:
        return Refusal(reason, field, [key])

    if field := unserved(start, info):
        raise refuse(pb.Refused.REASON_UNSUPPORTED, field)
    if problem := out_of_range(start.sampling, info.vocab_size):
        raise refuse(pb.Refused.REASON_INVALID, problem)
    ids = start.prompt_ids.le_u32 + start.output_ids.le_u32
    prompt_len, known = len(start.prompt_ids.le_u32) // 4, len(ids) // 4
    if prompt_len == 0 or len(start.prompt_ids.le_u32) % 4:
        raise refuse(pb.Refused.REASON_INVALID, "prompt_ids")
    if len(start.output_ids.le_u32) % 4:
        raise refuse(pb.Refused.REASON_INVALID, "output_ids")
    limits = start.limits
    if limits.max_tokens <= known - prompt_len:
        raise refuse(pb.Refused.REASON_INVALID, "max_tokens: nothing left to draw")
    if prompt_len + limits.max_tokens > info.max_context:
        raise refuse(
            pb.Refused.REASON_UNSUPPORTED, f"max_tokens: prompt and output pass max_context {info.max_context}"
        )
    if limits.min_tokens > limits.max_tokens:
        raise refuse(pb.Refused.REASON_UNSUPPORTED, "min_tokens")
    if any(id_ >= info.vocab_size for id_ in limits.stop_token_ids):
        raise refuse(pb.Refused.REASON_UNSUPPORTED, "stop_token_ids")

    tokens = np.zeros(prompt_len + limits.max_tokens, dtype=np.uint32)
    tokens[:known] = np.frombuffer(ids, dtype="<u4")
    if int(tokens[:known].max()) >= info.vocab_size:
        raise refuse(pb.Refused.REASON_UNSUPPORTED, "prompt_ids: an id outside the vocabulary")

    stops = set(limits.stop_token_ids) | (set() if limits.ignore_eos else set(info.eos_token_ids))
    return Row(
        key=key,
        hash_root=start.hash_root,
        tokens=tokens,
        known=known,
        prompt_len=prompt_len,
        max_tokens=limits.max_tokens,
        min_tokens=limits.min_tokens,
        stops=frozenset(stops),
        draw=read_draw(start.sampling, limits.min_tokens, stops, info.vocab_size),
        prefill_budget=start.prefill_budget,
        hold_rank=start.hold_rank,
    )


def read_draw(sampling: common.Sampling, min_tokens: int, stops: Iterable[int], vocab_size: int) -> Draw:
    def given(field: str, off: float) -> float:
        value: float = getattr(sampling, field)
        return value if sampling.HasField(field) else off

    return Draw(
        temperature=sampling.temperature,
        seed=sampling.seed,
        top_k=sampling.top_k,
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        logit_bias=tuple(sampling.logit_bias.items()),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        min_tokens=min_tokens,
        # A folder may name an eos that its vocabulary lacks.
        forbidden=tuple(sorted(id_ for id_ in stops if id_ < vocab_size)),
    )


def out_of_range(sampling: common.Sampling, vocab_size: int) -> str | None:
    """The first field with a value that means nothing, and what it must be. No range holds NaN."""
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    bias = sampling.logit_bias
    cases = (
        ("temperature: must be finite and not negative", 0 <= sampling.temperature < math.inf),
        ("top_p: must be above 0 and at most 1", 0 < top_p <= 1),
        ("min_p: must be from 0 to 1", 0 <= sampling.min_p <= 1),
        ("repetition_penalty: must be finite and above 0", 0 < repetition < math.inf),
        ("presence_penalty: must be finite", math.isfinite(sampling.presence_penalty)),
        ("frequency_penalty: must be finite", math.isfinite(sampling.frequency_penalty)),
        ("logit_bias: must be finite", all(map(math.isfinite, bias.values()))),
        (f"logit_bias: ids must be below {vocab_size}", max(bias, default=0) < vocab_size),
        (f"logprobs: must be at most {MOST_LOGPROBS}", sampling.logprobs <= MOST_LOGPROBS),
    )
    return next((problem for problem, holds in cases if not holds), None)


def unserved(start: pb.RowStart, info: common.WorkerInfo) -> str | None:
    """The first field with a value that this worker does not serve. A value that means "off" is served."""
    cases = (
        ("model", start.model not in info.served_names),
        ("adapter", bool(start.adapter)),
        ("deadline_ms_left", start.HasField("deadline_ms_left")),
    )
    return next((field for field, refused in cases if refused), None)
