# mypy: ignore-errors
from . import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Prompt(_message.Message):
    __slots__ = ("text", "ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    ids: _common_pb2.TokenIds
    def __init__(self, text: _Optional[str] = ..., ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompt", "sampling", "limits", "n", "stop", "request_id", "urgent")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    URGENT_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: Prompt
    sampling: _common_pb2.Sampling
    limits: _common_pb2.Limits
    n: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    urgent: bool
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., limits: _Optional[_Union[_common_pb2.Limits, _Mapping]] = ..., n: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ..., urgent: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "choice", "first_index", "ids", "text", "finish", "usage", "logprobs", "eta")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish: _common_pb2.FinishReason
    usage: Usage
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    eta: Eta
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., eta: _Optional[_Union[Eta, _Mapping]] = ...) -> None: ...

class Eta(_message.Message):
    __slots__ = ("lo_ms", "hi_ms")
    LO_MS_FIELD_NUMBER: _ClassVar[int]
    HI_MS_FIELD_NUMBER: _ClassVar[int]
    lo_ms: int
    hi_ms: int
    def __init__(self, lo_ms: _Optional[int] = ..., hi_ms: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens", "slices", "worker_id")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    slices: int
    worker_id: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., slices: _Optional[int] = ..., worker_id: _Optional[str] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("model", "prompt")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: Prompt
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("decision_id",)
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    decision_id: int
    def __init__(self, decision_id: _Optional[int] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("decision_id", "request", "choice", "worker_id", "policy", "turn", "prompt_tokens", "candidates", "seed", "arrivals", "prefill_time", "hotspot")
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TIME_FIELD_NUMBER: _ClassVar[int]
    HOTSPOT_FIELD_NUMBER: _ClassVar[int]
    decision_id: int
    request: int
    choice: int
    worker_id: str
    policy: str
    turn: int
    prompt_tokens: int
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateScore]
    seed: int
    arrivals: int
    prefill_time: int
    hotspot: Hotspot
    def __init__(self, decision_id: _Optional[int] = ..., request: _Optional[int] = ..., choice: _Optional[int] = ..., worker_id: _Optional[str] = ..., policy: _Optional[str] = ..., turn: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., candidates: _Optional[_Iterable[_Union[CandidateScore, _Mapping]]] = ..., seed: _Optional[int] = ..., arrivals: _Optional[int] = ..., prefill_time: _Optional[int] = ..., hotspot: _Optional[_Union[Hotspot, _Mapping]] = ...) -> None: ...

class Hotspot(_message.Message):
    __slots__ = ("block_hash", "blocks", "requests", "window", "workers", "holders", "alarm", "preferred", "filtered")
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    ALARM_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_FIELD_NUMBER: _ClassVar[int]
    FILTERED_FIELD_NUMBER: _ClassVar[int]
    block_hash: int
    blocks: int
    requests: int
    window: int
    workers: int
    holders: int
    alarm: bool
    preferred: bool
    filtered: bool
    def __init__(self, block_hash: _Optional[int] = ..., blocks: _Optional[int] = ..., requests: _Optional[int] = ..., window: _Optional[int] = ..., workers: _Optional[int] = ..., holders: _Optional[int] = ..., alarm: _Optional[bool] = ..., preferred: _Optional[bool] = ..., filtered: _Optional[bool] = ...) -> None: ...

class CandidateScore(_message.Message):
    __slots__ = ("worker_id", "new_tokens", "queued_tokens", "batch_size", "work_us", "free_blocks", "score_high", "score_low", "joined_us", "filtered")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    WORK_US_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SCORE_HIGH_FIELD_NUMBER: _ClassVar[int]
    SCORE_LOW_FIELD_NUMBER: _ClassVar[int]
    JOINED_US_FIELD_NUMBER: _ClassVar[int]
    FILTERED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    new_tokens: int
    queued_tokens: int
    batch_size: int
    work_us: int
    free_blocks: int
    score_high: int
    score_low: int
    joined_us: int
    filtered: bool
    def __init__(self, worker_id: _Optional[str] = ..., new_tokens: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., batch_size: _Optional[int] = ..., work_us: _Optional[int] = ..., free_blocks: _Optional[int] = ..., score_high: _Optional[int] = ..., score_low: _Optional[int] = ..., joined_us: _Optional[int] = ..., filtered: _Optional[bool] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("info", "url", "state", "detail", "queued_tokens", "batch_size", "running_rows", "held_rows", "running_blocks", "held_blocks", "indexed_blocks", "work_us")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[WorkerStatus.State]
        STATE_CONNECTING: _ClassVar[WorkerStatus.State]
        STATE_READY: _ClassVar[WorkerStatus.State]
        STATE_DRAINING: _ClassVar[WorkerStatus.State]
        STATE_REFUSED: _ClassVar[WorkerStatus.State]
    STATE_UNSPECIFIED: WorkerStatus.State
    STATE_CONNECTING: WorkerStatus.State
    STATE_READY: WorkerStatus.State
    STATE_DRAINING: WorkerStatus.State
    STATE_REFUSED: WorkerStatus.State
    INFO_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_ROWS_FIELD_NUMBER: _ClassVar[int]
    HELD_ROWS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WORK_US_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    url: str
    state: WorkerStatus.State
    detail: str
    queued_tokens: int
    batch_size: int
    running_rows: int
    held_rows: int
    running_blocks: int
    held_blocks: int
    indexed_blocks: int
    work_us: int
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ..., url: _Optional[str] = ..., state: _Optional[_Union[WorkerStatus.State, str]] = ..., detail: _Optional[str] = ..., queued_tokens: _Optional[int] = ..., batch_size: _Optional[int] = ..., running_rows: _Optional[int] = ..., held_rows: _Optional[int] = ..., running_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., indexed_blocks: _Optional[int] = ..., work_us: _Optional[int] = ...) -> None: ...

class AddWorkerRequest(_message.Message):
    __slots__ = ("url",)
    URL_FIELD_NUMBER: _ClassVar[int]
    url: str
    def __init__(self, url: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class RemoveWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("url", "join_token")
    URL_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    url: str
    join_token: str
    def __init__(self, url: _Optional[str] = ..., join_token: _Optional[str] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchDecisionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
