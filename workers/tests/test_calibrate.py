"""Calibration: the grid fits the worker, samples say what ran and how long, the budget holds, the file comes back."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scls_router.proto import common_pb2 as common
from scls_worker import calibrate, cost
from scls_worker.calibrate import COMMAND, START, Bench, Point
from scls_worker.errors import StartupError
from scls_worker.mock import MockRunner
from scls_worker.rows import Chunk, Drawn
from worker_harness import Router, make_info, start


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the grid is measured, however loaded the machine is."""
    monkeypatch.setattr(calibrate, "START", START._replace(seconds=1e6))
    monkeypatch.setattr(calibrate, "COMMAND", COMMAND._replace(seconds=1e6))


class Clock:
    """Stands still but for what a mock sleeps."""

    def __init__(self) -> None:
        self.us = 0

    def __call__(self) -> int:
        return self.us

    def sleep(self, seconds: float) -> None:
        self.us += round(seconds * 1e6)


class Watched(MockRunner):
    last: Sequence[Chunk] = ()

    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        self.last = list(chunks)
        return super().run(chunks)


class FakeModel:
    def __init__(self, form: dict[str, Any]) -> None:
        self.form = form

    def to_dict(self) -> dict[str, Any]:
        return self.form

    def to_json(self) -> str:
        quality = {name: self.form[name] for name in ("r2", "mean_error", "p99_error")}
        model = {"layout": self.form["shape"], "prefill": self.form["prefill"], "step": self.form["step"]}
        return json.dumps({"model": model, **quality})


class FakeModels:
    """Stands for `scls_router.CostModel`: remembers what it was to fit."""

    def __init__(self) -> None:
        self.samples: list[cost.Sample] = []

    def fit(self, samples: list[cost.Sample], layout: str) -> FakeModel:
        if len(samples) < 6:
            raise ValueError("too few samples")
        self.samples = samples
        return FakeModel(form_of(layout))

    def from_json(self, text: str) -> FakeModel:
        fit = json.loads(text)["fit"]
        if fit["model"]["step"]["constant"] < 0:
            raise ValueError("step.constant is negative")
        return FakeModel({"shape": fit["model"]["layout"], **fit["model"], **fit})


def form_of(layout: str) -> dict[str, Any]:
    known = MockRunner(1000, 2000, 100.0, padded=layout == "padded").cost()
    assert known is not None
    return known


def bench_of(padded: bool, step_us: int = 2000, prefill_us: float = 100.0, **info: Any) -> tuple[Bench, Watched]:
    clock = Clock()
    runner = Watched(1000, step_us, prefill_us, clock.sleep, padded)
    return Bench(runner, make_info(padded=padded, **info), clock), runner


infos = st.fixed_dictionaries(
    dict(
        blocks=st.integers(1, 400),
        block_size=st.sampled_from([1, 4, 16]),
        max_rows=st.integers(1, 70),
        max_context=st.integers(1, 5000),
        chunk_tokens=st.integers(1, 600),
    )
)


@settings(max_examples=60, deadline=None)
@given(infos, st.booleans(), st.sampled_from([START, COMMAND]))
def test_every_point_of_the_grid_runs_and_leaves_nothing(
    info: dict[str, int], padded: bool, effort: calibrate.Effort
) -> None:
    bench, runner = bench_of(padded, **info)
    points = calibrate.grid(bench.info, effort)
    assert len(set(points)) == len(points)
    for point in points:
        seconds = bench.take(point)
        assert seconds is not None
        pool = bench.engine.pool
        pool.check()
        assert (pool.running, pool.held, pool.reserved, bench.engine.rows) == (0, 0, 0, {})
        # What the runner was given is what the sample says.
        sample = bench.sample(point, seconds)
        assert all(chunk.start + chunk.size + 1 <= bench.info.max_context for chunk in runner.last)
        prefills = [
            chunk for chunk in runner.last if chunk.row.prompt_len == chunk.start + chunk.size and chunk.size > 1
        ]
        if padded:
            assert len(runner.last) == sample["rows"] <= info["max_rows"]
            assert max(chunk.start + chunk.size for chunk in runner.last) == sample["longest"]
            assert sum(chunk.size for chunk in prefills) == sample["prefill"]
        elif point.chunk > 1:
            steps = [chunk for chunk in runner.last if chunk not in prefills]
            assert len(steps) == sample["rows"] < info["max_rows"]
            assert sum(chunk.start + 1 for chunk in steps) == sample["context"]
            (chunk,) = prefills
            assert chunk.size == sample["prefill"] <= info["chunk_tokens"]
            assert sum(range(chunk.start + 1, chunk.start + chunk.size + 1)) == sample["pairs"]
        # The mock takes what its own model says, to the microsecond.
        known = runner.cost()
        assert known is not None
        per = known["prefill"]["per_cell" if padded else "per_token"]
        assert seconds == pytest.approx(known["step"]["constant"] + per * sample["prefill"], abs=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("effort", [START, COMMAND])
def test_the_grid_varies_all_that_a_model_weighs(padded: bool, effort: calibrate.Effort) -> None:
    info = make_info(blocks=2048, block_size=16, max_context=8192, max_rows=64, chunk_tokens=512, padded=padded)
    bench, _ = bench_of(padded)
    points = calibrate.grid(info, effort)
    samples = [bench.sample(point, 1.0) for point in points]
    fills = [s for s in samples if s["prefill"]]
    steps = [s for s in samples if not s["prefill"]]
    assert min(len(fills), len(steps)) >= 4 and len(points) < (20 if effort is START else 60)
    assert len({s["rows"] for s in steps}) >= 2 and len({s["longest"] for s in steps}) >= 3
    if padded:
        assert len({s["rows"] for s in fills}) >= 2 and len({s["longest"] for s in fills}) >= 2
    else:
        assert len({s["pairs"] / s["prefill"] for s in fills}) >= 4 and any(s["rows"] for s in fills)


def test_rounds_end_with_the_budget_and_points_too_long_for_it_are_left_out() -> None:
    # 100 ms a step, 10 ms a token: only small points fit into half a second.
    bench, _ = bench_of(False, 100_000, 10_000.0, blocks=2000, block_size=16, max_context=8192)
    short = START._replace(seconds=0.5)
    rounds = list(calibrate.measure(bench, calibrate.grid(bench.info, short), short))
    assert len(rounds) == 1 and 1 <= len(rounds[0]) < 6
    warmed = 100_000 + 100_000 + 16 * 10_000
    assert bench.clock() - warmed <= 1e6 * (short.seconds + 0.1)
    quick, _ = bench_of(False, 10, 0.1, blocks=2000, block_size=16, max_context=8192)
    assert len(list(calibrate.measure(quick, calibrate.grid(quick.info, START), START))) == START.rounds


def test_a_sample_is_the_median_of_its_rounds() -> None:
    clock = Clock()
    times = iter([5.0, 5.0, 0.010, 0.990, 0.030])  # two to warm up

    class Uneven(MockRunner):
        def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
            clock.sleep(next(times))
            return super().run(chunks)

    bench = Bench(Uneven(1000), make_info(), clock)
    effort = START._replace(seconds=10.0, rounds=3)
    calibrate_points = [Point(1, 16)]
    bench.take(Point(1, 16))
    *_, samples = calibrate.measure(bench, calibrate_points, effort)
    assert [sample["seconds"] for sample in samples] == [0.030]


def test_a_point_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Small(MockRunner):
        def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
            if any(chunk.size > 16 for chunk in chunks):
                raise RuntimeError("out of memory")
            return super().run(chunks)

    bench = Bench(Small(1000), make_info(blocks=2000, chunk_tokens=64), Clock())
    *_, samples = calibrate.measure(bench, calibrate.grid(bench.info, START), START)
    assert samples and max(sample["prefill"] for sample in samples) == 16


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("padded", [False, True])
def test_a_start_announces_the_fit(padded: bool) -> None:
    info = make_info(blocks=2000, max_context=2000, padded=padded)
    fake = FakeModels()
    calibrate.at_start(MockRunner(1000, padded=padded), info, lambda: fake)
    assert info.cost_model == cost.message(form_of("padded" if padded else "paged"))
    assert info.cost_model.WhichOneof("form") == ("padded" if padded else "paged")
    assert all(sample["seconds"] > 0 for sample in fake.samples)


def test_a_worker_that_cannot_be_measured_announces_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def none() -> cost.Models:
        raise ImportError("no CostModel")

    for info, models in ((make_info(), none), (make_info(max_context=4), FakeModels)):
        with caplog.at_level(logging.WARNING):
            calibrate.at_start(MockRunner(1000), info, models)
        assert not info.HasField("cost_model") and "not calibrated" in caplog.text
        caplog.clear()


@pytest.mark.usefixtures("unhurried")
def test_a_fit_that_misses_is_looked_at_again_and_never_announced(caplog: pytest.LogCaptureFixture) -> None:
    class Busy(FakeModels):
        """What a machine with other work gives at each look."""

        def __init__(self, *errors: float) -> None:
            super().__init__()
            self.errors = list(errors)

        def fit(self, samples: list[cost.Sample], layout: str) -> FakeModel:
            return FakeModel({**super().fit(samples, layout).form, "p99_error": self.errors.pop(0)})

    for errors, found in (([0.4, 9.0], 0.4), ([0.8, 3.0, 0.2, 9.0], 0.2), ([0.8, 0.9, 0.6, 0.1], None)):
        info, busy = make_info(blocks=2000, max_context=2000), Busy(*errors)
        calibrate.at_start(MockRunner(1000), info, lambda busy=busy: busy)  # type: ignore[misc]
        assert len(busy.errors) == 1 and info.HasField("cost_model") == (found is not None)
        assert found is None or info.cost_model.p99_error == found
    assert "not calibrated" in caplog.text and "misses by 60%" in caplog.text


@pytest.mark.usefixtures("unhurried")
def test_the_command_writes_what_a_worker_reads(tmp_path: Path) -> None:
    info = make_info(blocks=2000, max_context=2000)
    path = tmp_path / "cost.json"
    lines: list[str] = []
    calibrate.command(path, MockRunner(1000), info, lines.append, FakeModels)
    shares = [int(line.split("%")[0].split()[1]) for line in lines]
    assert shares[0] == 0 and shares[-1] == 100 and shares == sorted(shares) and len(lines) > 3
    written = json.loads(path.read_text())
    assert list(written) == ["model", "model_digest", "device", "dtype", "engine", "layout", "fit", "grid"]
    assert (written["model"], written["model_digest"], written["layout"]) == ("mock", "m", "paged")
    assert set(written["grid"][0]) == {"rows", "context", "longest", "prefill", "pairs", "seconds"}
    assert cost.read(path, info, FakeModels().from_json) == cost.message(form_of("paged"))


def test_a_file_of_another_worker_or_of_none_is_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info, path = make_info(), tmp_path / "cost.json"
    cost.write(path, info, FakeModel(form_of("paged")), [])
    good = path.read_text()

    def refused(match: str, other: common.WorkerInfo = info) -> None:
        with pytest.raises(StartupError, match=match):
            cost.read(path, other, FakeModels().from_json)

    refused("layout is paged, not padded", make_info(padded=True))
    refused("model_digest is m, not n\n.*--calibrate", make_info(model_digest="n"))
    path.write_text(good.replace('"constant": 0.002', '"constant": -1'))
    refused("step.constant is negative")
    for text, match in (("[]", "not a JSON object"), ("{", "Expecting"), ("[" * 100_000, "recursion")):
        path.write_text(text)
        refused(match)
    path.unlink()
    refused("cannot read --cost-model .*No such file")
    path.write_text(good)
    cost.read(path, make_info(device="cuda"), FakeModels().from_json)
    assert "measured on another device: none" in caplog.text
    with pytest.raises(StartupError, match="no such folder"):
        calibrate.command(tmp_path / "no" / "f", MockRunner(1000), info, print, FakeModels)


def test_a_mock_knows_its_cost() -> None:
    assert MockRunner(1000).cost() is None
    paged = cost.message(form_of("paged")).paged
    assert (paged.step_constant_s, paged.prefill_per_token_s) == pytest.approx((2e-3, 1e-4))
    padded = cost.message(form_of("padded")).padded
    assert (padded.prefill.constant_s, padded.prefill.per_cell_s, padded.step.constant_s) == pytest.approx(
        (2e-3, 1e-4, 2e-3)
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("effort", [START, COMMAND])
def test_the_real_fit_finds_the_mocks_cost(padded: bool, effort: calibrate.Effort) -> None:
    bench, runner = bench_of(padded, 1500, 70.0, blocks=2000, block_size=16, max_context=8192, chunk_tokens=512)
    model, samples = calibrate.fitted(bench, effort._replace(seconds=1000.0), cost.models())
    known, found = runner.cost(), model.to_dict()
    assert known is not None and len(samples) == len(calibrate.grid(bench.info, effort))
    for part in ("prefill", "step"):
        assert found[part] == pytest.approx(known[part], rel=1e-3, abs=1e-7)
    assert found["p99_error"] < 1e-3


@pytest.mark.parametrize("bad", ["-1.0", "NaN", "Infinity", "null", '"x"'])
def test_the_real_model_refuses_what_no_worker_can_have(tmp_path: Path, bad: str) -> None:
    path, info = tmp_path / "cost.json", make_info()
    cost.write(path, info, FakeModel(form_of("paged")), [])
    assert cost.read(path, info) == cost.message(form_of("paged"))
    path.write_text(path.read_text().replace('"per_row": 0.0', f'"per_row": {bad}'))
    with pytest.raises((StartupError), match="per_row"):
        cost.read(path, info)


# ---------------------------------------------------------------- a real model


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("padded", [False, True])
def test_on_a_real_model_and_it_serves_alike_afterwards(tmp_path: Path, padded: bool) -> None:
    pytest.importorskip("torch")
    import tiny_llama
    from scls_worker.options import build, parser

    folder = tiny_llama.write(tmp_path / "tiny")
    layout = ["--layout", "padded"] if padded else []
    served = build(parser().parse_args(["--model", str(folder), "--device", "cpu", "--threads", "1", *layout]))
    assert served.info.cost_shape == (common.COST_SHAPE_PADDED if padded else common.COST_SHAPE_PAGED)

    def output() -> list[int]:
        router = Router(
            served.runner, blocks=served.info.blocks, block_size=16, vocab_size=tiny_llama.VOCAB, padded=padded
        )
        router.plan(1, add=[start(1, list(range(5, 40)), 8), start(2, [7, 9], 8)])
        router.run()
        return router.outputs[1, 0] + router.outputs[2, 0]

    before, fake = output(), FakeModels()
    calibrate.at_start(served.runner, served.info, lambda: fake)
    assert len(fake.samples) == len(calibrate.grid(served.info, START))
    assert served.info.HasField("cost_model") and output() == before


@pytest.mark.usefixtures("unhurried")
def test_a_look_that_a_stall_took_is_repeated() -> None:
    class Stalled(FakeModels):
        looks = 0

        def fit(self, samples: list[cost.Sample], layout: str) -> FakeModel:
            self.looks += 1
            if self.looks < 3:
                raise ValueError("0 samples of prefill")
            return super().fit(samples, layout)

    info, stalled = make_info(blocks=2000, max_context=2000), Stalled()
    calibrate.at_start(MockRunner(1000), info, lambda: stalled)
    assert info.HasField("cost_model") and stalled.looks == 3
