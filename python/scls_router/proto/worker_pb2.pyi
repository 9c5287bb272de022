# mypy: ignore-errors
from . import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("name", "data", "last_of_file")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_OF_FILE_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    last_of_file: bool
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ..., last_of_file: _Optional[bool] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("cmd_seq", "hello", "plan", "cut", "drop", "release_kv", "resync", "ping")
    CMD_SEQ_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KV_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    cmd_seq: int
    hello: Hello
    plan: Plan
    cut: Cut
    drop: Drop
    release_kv: ReleaseKv
    resync: Resync
    ping: Ping
    def __init__(self, cmd_seq: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., cut: _Optional[_Union[Cut, _Mapping]] = ..., drop: _Optional[_Union[Drop, _Mapping]] = ..., release_kv: _Optional[_Union[ReleaseKv, _Mapping]] = ..., resync: _Optional[_Union[Resync, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "owner_epoch", "last_seq_seen", "worker_epoch", "proto_minor")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_SEEN_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTO_MINOR_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    owner_epoch: int
    last_seq_seen: int
    worker_epoch: int
    proto_minor: int
    def __init__(self, router_id: _Optional[str] = ..., owner_epoch: _Optional[int] = ..., last_seq_seen: _Optional[int] = ..., worker_epoch: _Optional[int] = ..., proto_minor: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("plan_no", "base_batch", "keep", "keep_rows", "add", "leave", "steps", "ceiling_blocks", "hold_ranks")
    class Keep(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KEEP_UNSPECIFIED: _ClassVar[Plan.Keep]
        KEEP_SURVIVORS: _ClassVar[Plan.Keep]
        KEEP_NONE: _ClassVar[Plan.Keep]
        KEEP_LIST: _ClassVar[Plan.Keep]
    KEEP_UNSPECIFIED: Plan.Keep
    KEEP_SURVIVORS: Plan.Keep
    KEEP_NONE: Plan.Keep
    KEEP_LIST: Plan.Keep
    PLAN_NO_FIELD_NUMBER: _ClassVar[int]
    BASE_BATCH_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CEILING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLD_RANKS_FIELD_NUMBER: _ClassVar[int]
    plan_no: int
    base_batch: int
    keep: Plan.Keep
    keep_rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.RowId]
    add: _containers.RepeatedCompositeFieldContainer[RowStart]
    leave: _containers.RepeatedCompositeFieldContainer[_common_pb2.RowId]
    steps: int
    ceiling_blocks: int
    hold_ranks: _containers.RepeatedCompositeFieldContainer[HoldRank]
    def __init__(self, plan_no: _Optional[int] = ..., base_batch: _Optional[int] = ..., keep: _Optional[_Union[Plan.Keep, str]] = ..., keep_rows: _Optional[_Iterable[_Union[_common_pb2.RowId, _Mapping]]] = ..., add: _Optional[_Iterable[_Union[RowStart, _Mapping]]] = ..., leave: _Optional[_Iterable[_Union[_common_pb2.RowId, _Mapping]]] = ..., steps: _Optional[int] = ..., ceiling_blocks: _Optional[int] = ..., hold_ranks: _Optional[_Iterable[_Union[HoldRank, _Mapping]]] = ...) -> None: ...

class HoldRank(_message.Message):
    __slots__ = ("row", "rank")
    ROW_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    row: _common_pb2.RowId
    rank: int
    def __init__(self, row: _Optional[_Union[_common_pb2.RowId, _Mapping]] = ..., rank: _Optional[int] = ...) -> None: ...

class RowStart(_message.Message):
    __slots__ = ("row", "slice_no", "model", "adapter", "hash_root", "prompt_ids", "output_ids", "sampling", "limits", "hold_rank", "deadline_ms_left", "traceparent", "prefill_budget")
    ROW_FIELD_NUMBER: _ClassVar[int]
    SLICE_NO_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    HASH_ROOT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    HOLD_RANK_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_LEFT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BUDGET_FIELD_NUMBER: _ClassVar[int]
    row: _common_pb2.RowId
    slice_no: int
    model: str
    adapter: str
    hash_root: int
    prompt_ids: _common_pb2.TokenIds
    output_ids: _common_pb2.TokenIds
    sampling: _common_pb2.Sampling
    limits: _common_pb2.Limits
    hold_rank: int
    deadline_ms_left: int
    traceparent: str
    prefill_budget: int
    def __init__(self, row: _Optional[_Union[_common_pb2.RowId, _Mapping]] = ..., slice_no: _Optional[int] = ..., model: _Optional[str] = ..., adapter: _Optional[str] = ..., hash_root: _Optional[int] = ..., prompt_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., output_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.Limits, _Mapping]] = ..., hold_rank: _Optional[int] = ..., deadline_ms_left: _Optional[int] = ..., traceparent: _Optional[str] = ..., prefill_budget: _Optional[int] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("batch", "after_step")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    batch: int
    after_step: int
    def __init__(self, batch: _Optional[int] = ..., after_step: _Optional[int] = ...) -> None: ...

class Drop(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.RowId]
    def __init__(self, rows: _Optional[_Iterable[_Union[_common_pb2.RowId, _Mapping]]] = ...) -> None: ...

class ReleaseKv(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.RowId]
    def __init__(self, rows: _Optional[_Iterable[_Union[_common_pb2.RowId, _Mapping]]] = ...) -> None: ...

class Resync(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("worker_epoch", "state_seq", "snapshot", "kv_delta", "step", "slice_report", "refused", "load", "pong", "goodbye")
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_SEQ_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    KV_DELTA_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLICE_REPORT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    worker_epoch: int
    state_seq: int
    snapshot: Snapshot
    kv_delta: KvDelta
    step: Step
    slice_report: SliceReport
    refused: Refused
    load: Load
    pong: Pong
    goodbye: Goodbye
    def __init__(self, worker_epoch: _Optional[int] = ..., state_seq: _Optional[int] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., kv_delta: _Optional[_Union[KvDelta, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., slice_report: _Optional[_Union[SliceReport, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("chunk", "last", "hashes_le_u64")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    HASHES_LE_U64_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    last: bool
    hashes_le_u64: bytes
    def __init__(self, chunk: _Optional[int] = ..., last: _Optional[bool] = ..., hashes_le_u64: _Optional[bytes] = ...) -> None: ...

class KvDelta(_message.Message):
    __slots__ = ("stored_le_u64", "removed_le_u64")
    STORED_LE_U64_FIELD_NUMBER: _ClassVar[int]
    REMOVED_LE_U64_FIELD_NUMBER: _ClassVar[int]
    stored_le_u64: bytes
    removed_le_u64: bytes
    def __init__(self, stored_le_u64: _Optional[bytes] = ..., removed_le_u64: _Optional[bytes] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("batch", "step", "rows")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    batch: int
    step: int
    rows: _containers.RepeatedCompositeFieldContainer[RowTokens]
    def __init__(self, batch: _Optional[int] = ..., step: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[RowTokens, _Mapping]]] = ...) -> None: ...

class RowTokens(_message.Message):
    __slots__ = ("row", "first_index", "ids", "logprobs", "finish", "cached_tokens")
    ROW_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    row: _common_pb2.RowId
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    finish: _common_pb2.FinishReason
    cached_tokens: int
    def __init__(self, row: _Optional[_Union[_common_pb2.RowId, _Mapping]] = ..., first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., finish: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class SliceReport(_message.Message):
    __slots__ = ("batch", "end", "steps", "rows", "prefill_us", "decode_us", "queue_us", "peak_blocks", "next_batch", "error", "idle_us", "pad_tokens", "invalid_tokens")
    class End(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        END_UNSPECIFIED: _ClassVar[SliceReport.End]
        END_STEPS: _ClassVar[SliceReport.End]
        END_ALL_DONE: _ClassVar[SliceReport.End]
        END_CUT: _ClassVar[SliceReport.End]
        END_BACKPRESSURE: _ClassVar[SliceReport.End]
        END_ERROR: _ClassVar[SliceReport.End]
    END_UNSPECIFIED: SliceReport.End
    END_STEPS: SliceReport.End
    END_ALL_DONE: SliceReport.End
    END_CUT: SliceReport.End
    END_BACKPRESSURE: SliceReport.End
    END_ERROR: SliceReport.End
    BATCH_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    PEAK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_BATCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IDLE_US_FIELD_NUMBER: _ClassVar[int]
    PAD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INVALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    batch: int
    end: SliceReport.End
    steps: int
    rows: _containers.RepeatedCompositeFieldContainer[RowReport]
    prefill_us: int
    decode_us: int
    queue_us: int
    peak_blocks: int
    next_batch: int
    error: str
    idle_us: int
    pad_tokens: int
    invalid_tokens: int
    def __init__(self, batch: _Optional[int] = ..., end: _Optional[_Union[SliceReport.End, str]] = ..., steps: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[RowReport, _Mapping]]] = ..., prefill_us: _Optional[int] = ..., decode_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., peak_blocks: _Optional[int] = ..., next_batch: _Optional[int] = ..., error: _Optional[str] = ..., idle_us: _Optional[int] = ..., pad_tokens: _Optional[int] = ..., invalid_tokens: _Optional[int] = ...) -> None: ...

class RowReport(_message.Message):
    __slots__ = ("row", "computed", "cached", "emitted", "finish", "kv", "prefill_left", "blocks")
    class Kv(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KV_UNSPECIFIED: _ClassVar[RowReport.Kv]
        KV_HELD: _ClassVar[RowReport.Kv]
        KV_DROPPED: _ClassVar[RowReport.Kv]
    KV_UNSPECIFIED: RowReport.Kv
    KV_HELD: RowReport.Kv
    KV_DROPPED: RowReport.Kv
    ROW_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LEFT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    row: _common_pb2.RowId
    computed: int
    cached: int
    emitted: int
    finish: _common_pb2.FinishReason
    kv: RowReport.Kv
    prefill_left: int
    blocks: int
    def __init__(self, row: _Optional[_Union[_common_pb2.RowId, _Mapping]] = ..., computed: _Optional[int] = ..., cached: _Optional[int] = ..., emitted: _Optional[int] = ..., finish: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., kv: _Optional[_Union[RowReport.Kv, str]] = ..., prefill_left: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("plan_no", "reason", "detail", "free_blocks", "held_blocks", "cached_blocks", "rows")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Refused.Reason]
        REASON_STALE: _ClassVar[Refused.Reason]
        REASON_NO_MEMORY: _ClassVar[Refused.Reason]
        REASON_TOO_MANY_ROWS: _ClassVar[Refused.Reason]
        REASON_UNKNOWN_ROW: _ClassVar[Refused.Reason]
        REASON_UNSUPPORTED: _ClassVar[Refused.Reason]
        REASON_INVALID: _ClassVar[Refused.Reason]
        REASON_NOT_OWNER: _ClassVar[Refused.Reason]
    REASON_UNSPECIFIED: Refused.Reason
    REASON_STALE: Refused.Reason
    REASON_NO_MEMORY: Refused.Reason
    REASON_TOO_MANY_ROWS: Refused.Reason
    REASON_UNKNOWN_ROW: Refused.Reason
    REASON_UNSUPPORTED: Refused.Reason
    REASON_INVALID: Refused.Reason
    REASON_NOT_OWNER: Refused.Reason
    PLAN_NO_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    plan_no: int
    reason: Refused.Reason
    detail: str
    free_blocks: int
    held_blocks: int
    cached_blocks: int
    rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.RowId]
    def __init__(self, plan_no: _Optional[int] = ..., reason: _Optional[_Union[Refused.Reason, str]] = ..., detail: _Optional[str] = ..., free_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[_common_pb2.RowId, _Mapping]]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running_rows", "held_rows", "free_blocks", "running_blocks", "held_blocks", "cached_blocks", "iterations")
    RUNNING_ROWS_FIELD_NUMBER: _ClassVar[int]
    HELD_ROWS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    running_rows: int
    held_rows: int
    free_blocks: int
    running_blocks: int
    held_blocks: int
    cached_blocks: int
    iterations: int
    def __init__(self, running_rows: _Optional[int] = ..., held_rows: _Optional[int] = ..., free_blocks: _Optional[int] = ..., running_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., iterations: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
