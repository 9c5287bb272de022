# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class CostShape(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COST_SHAPE_UNSPECIFIED: _ClassVar[CostShape]
    COST_SHAPE_PADDED: _ClassVar[CostShape]
    COST_SHAPE_PAGED: _ClassVar[CostShape]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
COST_SHAPE_UNSPECIFIED: CostShape
COST_SHAPE_PADDED: CostShape
COST_SHAPE_PAGED: CostShape

class RowId(_message.Message):
    __slots__ = ("request", "choice", "attempt")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request: int
    choice: int
    attempt: int
    def __init__(self, request: _Optional[int] = ..., choice: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("le_u32",)
    LE_U32_FIELD_NUMBER: _ClassVar[int]
    le_u32: bytes
    def __init__(self, le_u32: _Optional[bytes] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "ignore_eos", "stop_token_ids")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("chosen", "top_ids", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top: _Optional[_Iterable[float]] = ...) -> None: ...

class CostModel(_message.Message):
    __slots__ = ("padded", "paged", "r2", "mean_error", "p99_error")
    PADDED_FIELD_NUMBER: _ClassVar[int]
    PAGED_FIELD_NUMBER: _ClassVar[int]
    R2_FIELD_NUMBER: _ClassVar[int]
    MEAN_ERROR_FIELD_NUMBER: _ClassVar[int]
    P99_ERROR_FIELD_NUMBER: _ClassVar[int]
    padded: PaddedCostModel
    paged: PagedCostModel
    r2: float
    mean_error: float
    p99_error: float
    def __init__(self, padded: _Optional[_Union[PaddedCostModel, _Mapping]] = ..., paged: _Optional[_Union[PagedCostModel, _Mapping]] = ..., r2: _Optional[float] = ..., mean_error: _Optional[float] = ..., p99_error: _Optional[float] = ...) -> None: ...

class PaddedCostModel(_message.Message):
    __slots__ = ("prefill", "step")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    prefill: PaddedCost
    step: PaddedCost
    def __init__(self, prefill: _Optional[_Union[PaddedCost, _Mapping]] = ..., step: _Optional[_Union[PaddedCost, _Mapping]] = ...) -> None: ...

class PaddedCost(_message.Message):
    __slots__ = ("constant_s", "per_row_s", "per_position_s", "per_cell_s")
    CONSTANT_S_FIELD_NUMBER: _ClassVar[int]
    PER_ROW_S_FIELD_NUMBER: _ClassVar[int]
    PER_POSITION_S_FIELD_NUMBER: _ClassVar[int]
    PER_CELL_S_FIELD_NUMBER: _ClassVar[int]
    constant_s: float
    per_row_s: float
    per_position_s: float
    per_cell_s: float
    def __init__(self, constant_s: _Optional[float] = ..., per_row_s: _Optional[float] = ..., per_position_s: _Optional[float] = ..., per_cell_s: _Optional[float] = ...) -> None: ...

class PagedCostModel(_message.Message):
    __slots__ = ("prefill_constant_s", "prefill_per_token_s", "prefill_per_pair_s", "step_constant_s", "step_per_row_s", "step_per_context_token_s")
    PREFILL_CONSTANT_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PER_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PER_PAIR_S_FIELD_NUMBER: _ClassVar[int]
    STEP_CONSTANT_S_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_ROW_S_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_CONTEXT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    prefill_constant_s: float
    prefill_per_token_s: float
    prefill_per_pair_s: float
    step_constant_s: float
    step_per_row_s: float
    step_per_context_token_s: float
    def __init__(self, prefill_constant_s: _Optional[float] = ..., prefill_per_token_s: _Optional[float] = ..., prefill_per_pair_s: _Optional[float] = ..., step_constant_s: _Optional[float] = ..., step_per_row_s: _Optional[float] = ..., step_per_context_token_s: _Optional[float] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "worker_epoch", "model_digest", "served_names", "vocab_size", "eos_token_ids", "max_context", "block_size", "blocks", "max_rows", "row_buckets", "cost_shape", "cost_model", "tokenizer_digest", "proto_minor", "chunk_tokens", "device", "dtype", "engine")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVED_NAMES_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    COST_SHAPE_FIELD_NUMBER: _ClassVar[int]
    COST_MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTO_MINOR_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    worker_epoch: int
    model_digest: str
    served_names: _containers.RepeatedScalarFieldContainer[str]
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_context: int
    block_size: int
    blocks: int
    max_rows: int
    row_buckets: _containers.RepeatedScalarFieldContainer[int]
    cost_shape: CostShape
    cost_model: CostModel
    tokenizer_digest: str
    proto_minor: int
    chunk_tokens: int
    device: str
    dtype: str
    engine: str
    def __init__(self, worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ..., model_digest: _Optional[str] = ..., served_names: _Optional[_Iterable[str]] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., max_context: _Optional[int] = ..., block_size: _Optional[int] = ..., blocks: _Optional[int] = ..., max_rows: _Optional[int] = ..., row_buckets: _Optional[_Iterable[int]] = ..., cost_shape: _Optional[_Union[CostShape, str]] = ..., cost_model: _Optional[_Union[CostModel, _Mapping]] = ..., tokenizer_digest: _Optional[str] = ..., proto_minor: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., engine: _Optional[str] = ...) -> None: ...
