"""Cost models against their formulas, written out step by step."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scls_router import CostError, CostModel, FitError

PADDED = ("constant", "per_row", "per_position", "per_cell")
PAGED = {"prefill": ("constant", "per_token", "per_pair"), "step": ("constant", "per_row", "per_context")}

coefficient = st.floats(0, 1e-2)
four = st.tuples(*[coefficient] * 4)
padded = st.builds(CostModel.padded, prefill=four, step=four)
paged = st.builds(CostModel.paged, **{f"{part}_{name}": coefficient for part, names in PAGED.items() for name in names})


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-15)


@given(padded, st.integers(1, 64), st.integers(1, 4000), st.integers(1, 100))
def test_a_padded_slice_is_a_pass_and_its_steps(model: CostModel, rows: int, longest: int, steps: int) -> None:
    passes = [model.iteration(rows=rows, longest=longest, prefill=rows * longest)]
    passes += [model.iteration(rows=rows, longest=longest + k) for k in range(1, steps)]
    assert model.slice(rows=rows, longest=longest, steps=steps) == near(math.fsum(passes))


@given(paged, st.lists(st.integers(1, 3000), min_size=1, max_size=20), st.integers(1, 100))
def test_a_paged_slice_of_rows_that_decode_is_its_steps(model: CostModel, lengths: list[int], steps: int) -> None:
    n = len(lengths)
    passes = [model.iteration(rows=n, context=sum(lengths) + n * k) for k in range(steps)]
    assert model.slice(rows=n, context=sum(lengths), steps=steps) == near(math.fsum(passes))


@given(padded, st.integers(0, 99), st.integers(0, 9999), st.integers(0, 9999))
def test_a_padded_iteration_is_its_formula(model: CostModel, n: int, longest: int, prefill: int) -> None:
    c = model.to_dict()["prefill" if prefill else "step"]
    cells = c["constant"] + c["per_row"] * n + c["per_position"] * longest + c["per_cell"] * n * longest
    assert model.iteration(rows=n, longest=longest, prefill=prefill) == near(cells)


@given(paged, st.integers(0, 99), st.integers(0, 9999), st.integers(1, 999), st.integers(0, 10**6))
def test_a_paged_iteration_is_its_formula(model: CostModel, n: int, context: int, new: int, pairs: int) -> None:
    prefill, step = model.to_dict()["prefill"], model.to_dict()["step"]
    alone = step["constant"] + step["per_row"] * n + step["per_context"] * context
    chunk = prefill["constant"] + prefill["per_token"] * new + prefill["per_pair"] * pairs
    assert model.iteration(rows=n, context=context) == near(alone)
    assert model.iteration(rows=n, context=context, prefill=new, pairs=pairs) == near(alone + chunk)


@given(st.one_of(padded, paged))
def test_a_model_is_a_value(model: CostModel) -> None:
    assert CostModel.from_json(model.to_json()) == CostModel(model.to_dict()) == model
    assert CostModel(json.loads(model.to_json())) == pickle.loads(pickle.dumps(model)) == model
    assert model.layout == model.to_dict()["shape"] == json.loads(model.to_json())["layout"]
    assert eval(repr(model), {"CostModel": CostModel}) == model
    assert model.r2 is model.mean_error is model.p99_error is None
    assert model != CostModel.padded(prefill=(1.0, 0.0, 0.0, 0.0), step=(0.0, 0.0, 0.0, 0.0))


def grid(layout: str) -> list[dict[str, int]]:
    shapes = [(rows, each) for rows in (1, 4, 16, 40) for each in (16, 100, 700)]
    if layout == "padded":
        return [{"rows": n, "longest": each, "prefill": n * each * fills} for n, each in shapes for fills in (0, 1)]
    steps = [{"rows": n, "context": n * each} for n, each in shapes]
    fills = [{"prefill": n, "pairs": n * (n + 1) // 2 + n * had} for n in (8, 64, 500) for had in (0, 333)]
    return steps + fills + [step | fill for step in steps for fill in fills]


@given(st.one_of(padded, paged))
def test_a_fit_finds_the_model_that_made_its_samples(truth: CostModel) -> None:
    samples = [it | {"seconds": truth.iteration(**it)} for it in grid(truth.layout)]
    if not all(sample["seconds"] > 1e-12 for sample in samples):
        return  # no worker takes no time
    model = CostModel.fit(samples, layout=truth.layout)  # type: ignore[arg-type]
    assert model.layout == truth.layout
    assert model.r2 is not None and model.p99_error is not None
    assert model.r2 > 1 - 1e-6 and model.p99_error < 1e-4
    assert model.to_dict()["r2"] == model.r2
    assert CostModel.from_json(model.to_json()) == CostModel(model.to_dict()) == pickle.loads(pickle.dumps(model))


def test_a_calibration_of_the_router_is_read() -> None:
    model = CostModel.fit([it | {"seconds": 0.01 + 1e-5 * it["rows"]} for it in grid("padded")], "padded")
    sample = {"rows": 1, "context": 0, "longest": 1, "prefill": 0, "pairs": 0, "seconds": 0.01}
    of = {"model": "sha256:00", "device": "2 cores", "engine": "torch"}
    whole = of | {"fit": json.loads(model.to_json()), "grid": [sample]}
    assert CostModel.from_json(json.dumps(whole)) == CostModel.from_json(json.dumps(whole).encode()) == model


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf, 86_400.0])
@pytest.mark.parametrize("part", ["prefill", "step"])
def test_a_coefficient_that_cannot_be_is_named(part: str, value: float) -> None:
    good = (0.0, 0.0, 0.0, 0.0)
    for at, name in enumerate(PADDED):
        bad = {"prefill": good, "step": good, part: (*good[:at], value, *good[at + 1 :])}
        with pytest.raises(CostError, match=rf"^{part}\.{name} is "):
            CostModel.padded(**bad)
    good_paged = {f"{p}_{name}": 0.0 for p, names in PAGED.items() for name in names}
    for name in PAGED[part]:
        with pytest.raises(CostError, match=rf"^{part}\.{name} is "):
            CostModel.paged(**(good_paged | {f"{part}_{name}": value}))


@pytest.mark.parametrize("model", [CostModel.padded(prefill=(0, 0, 0, 1), step=(1, 0, 0, 0))])
def test_what_is_missing_is_named(model: CostModel) -> None:
    for part in ("prefill", "step"):
        for name in PADDED:
            form = model.to_dict()
            del form[part][name]
            with pytest.raises(CostError, match=rf"{part}\.{name} is missing"):
                CostModel(form)
        form = model.to_dict()
        del form[part]
        with pytest.raises(CostError, match=f"{part} is missing"):
            CostModel.from_json(json.dumps(form))
    with pytest.raises(CostError, match="shape is missing"):
        CostModel({})
    with pytest.raises(TypeError, match="step_per_row"):
        CostModel.paged(  # type: ignore[call-arg]
            prefill_constant=0, prefill_per_token=0, prefill_per_pair=0, step_constant=0, step_per_context=0
        )


def test_what_makes_no_sense_is_an_error() -> None:
    model = CostModel.padded(prefill=(0, 0, 0, 1), step=(1, 0, 0, 0))
    with pytest.raises(ValueError, match="layouts: paged, padded"):
        CostModel.fit([], "flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such layout"):
        CostModel(model.to_dict() | {"shape": "flat"})
    with pytest.raises(TypeError, match=r"step\.constant is a number"):
        CostModel(model.to_dict() | {"step": dict.fromkeys(PADDED, "many")})
    with pytest.raises(ValueError, match="length 4"):
        CostModel.padded(prefill=[0, 0, 0], step=[1, 0, 0, 0])
    with pytest.raises(ValueError, match="JSON object"):
        CostModel.from_json("[1]")
    with pytest.raises(ValueError, match="Expecting"):
        CostModel.from_json("{")
    with pytest.raises(OverflowError):
        model.iteration(rows=-1)
    with pytest.raises(OverflowError):
        model.slice(rows=1, steps=2**64)
    with pytest.raises(TypeError):
        CostModel.from_json(None)  # type: ignore[arg-type]
    assert model.slice(rows=0, steps=5) == model.slice(rows=5, steps=0) == 0.0


@pytest.mark.parametrize(
    ("samples", "error", "match"),
    [
        ([], FitError, "0 samples of prefill"),
        ([{"rows": 1}], ValueError, "sample 0 has no seconds"),
        ([{"row": 1, "seconds": 1.0}], ValueError, "sample 0 has a key row"),
        ([{"rows": 1, "seconds": 0.0}], FitError, "sample 0 took 0"),
        ([{"rows": 1, "seconds": math.nan}], FitError, "sample 0 took NaN"),
        ([{"rows": -1, "seconds": 1.0}], OverflowError, "negative"),
        ([{"rows": 1.5, "seconds": 1.0}], TypeError, "float"),
        ([3], TypeError, "Mapping"),
    ],
)
def test_samples_that_are_none_are_named(samples: list[Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        CostModel.fit(samples)
