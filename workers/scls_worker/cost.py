"""Cost models as the worker has them: what it announces, and the file that keeps one. All times are seconds.

The fit and the check of coefficients are scls_router's; here they are read, written and turned into a message.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from scls_router.proto import common_pb2 as common

from .errors import StartupError

log = logging.getLogger(__name__)

# What an iteration computed, by the core's names, and the seconds it took.
Sample = dict[str, float]


class Model(Protocol):
    """`scls_router.CostModel`."""

    def to_dict(self) -> dict[str, Any]: ...

    def to_json(self) -> str: ...


class Models(Protocol):
    """The class of it."""

    def fit(self, samples: list[Sample], layout: str) -> Model: ...

    def from_json(self, text: str) -> Model: ...


def models() -> Models:
    import scls_router

    return cast(Models, scls_router.CostModel)


def layout_name(info: common.WorkerInfo) -> str:
    return "padded" if info.cost_shape == common.COST_SHAPE_PADDED else "paged"


def message(form: Mapping[str, Any]) -> common.CostModel:
    """What `Model.to_dict` gives, as the contract has it."""
    prefill, step = form["prefill"], form["step"]
    quality = {name: form[name] for name in ("r2", "mean_error", "p99_error") if form.get(name) is not None}
    if form["shape"] == "padded":
        prefill, step = ({f"{name}_s": value for name, value in part.items()} for part in (prefill, step))
        padded = common.PaddedCostModel(prefill=common.PaddedCost(**prefill), step=common.PaddedCost(**step))
        return common.CostModel(padded=padded, **quality)
    paged = common.PagedCostModel(
        prefill_constant_s=prefill["constant"],
        prefill_per_token_s=prefill["per_token"],
        prefill_per_pair_s=prefill["per_pair"],
        step_constant_s=step["constant"],
        step_per_row_s=step["per_row"],
        step_per_context_token_s=step["per_context"],
    )
    return common.CostModel(paged=paged, **quality)


def write(path: Path, info: common.WorkerInfo, model: Model, grid: Sequence[Sample]) -> None:
    calibration = {
        "model": info.served_names[0],
        "model_digest": info.model_digest,
        "device": info.device,
        "dtype": info.dtype,
        "engine": info.engine,
        "layout": layout_name(info),
        "fit": json.loads(model.to_json()),
        "grid": list(grid),
    }
    try:
        path.write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"cannot write {path}: {error.strerror}") from None


def read(path: Path, info: common.WorkerInfo, parse: Callable[[str], Model] | None = None) -> common.CostModel:
    """The model in a file that `write` made for a worker like this; raises StartupError where it is for another, or no
    worker can have it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        calibration = json.loads(text)
        if not isinstance(calibration, dict):
            raise ValueError("not a JSON object")
        # What it raises names the coefficient.
        form = (parse or models().from_json)(text).to_dict()
    except OSError as error:
        raise StartupError(f"cannot read --cost-model {path}: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise StartupError(f"--cost-model {path}: {error}") from None
    for name, its, ours in (
        ("layout", form["shape"], layout_name(info)),
        ("model_digest", calibration.get("model_digest"), info.model_digest),
    ):
        if its != ours:
            raise StartupError(
                f"--cost-model {path} is of another worker: {name} is {its}, not {ours}\n  measure it: --calibrate FILE"
            )
    for name in ("device", "dtype"):
        if calibration.get(name) != getattr(info, name):
            log.warning("the cost model was measured on another %s: %s", name, calibration.get(name))
    return message(form)
