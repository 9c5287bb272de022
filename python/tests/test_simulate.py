"""`scls_router.simulate`: figures, columns, pictures, errors, and that it lets other threads and Ctrl-C through."""

from __future__ import annotations

import doctest
import math
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import scls_router
from scls_router import Simulation, simulate, simulation

TRACES = Path(__file__).resolve().parents[2] / "bench/traces"


@pytest.fixture(scope="module")
def two() -> Simulation:
    trace = TRACES / "mooncake_conversation_smoke.jsonl.gz"
    return simulate(trace, workers=4, scheduler=["continuous", "slice"], policy="product_anticipating", window=(0, 40))


def test_examples_of_the_docs_run() -> None:
    failed, attempted = doctest.testmod(simulation)
    assert attempted > 0 and failed == 0


def test_a_run_is_a_line_of_figures(two: Simulation) -> None:
    assert len(two) == len(two.runs) == 2
    assert [run["scheduler"] for run in two.runs] == ["continuous", "slice"]
    for run in two.runs:
        assert run["unfinished"] == run["rejected"] == 0
        assert 0 < run["ttft_mean"] < run["latency_mean"] and run["throughput"] > 0
    assert str(two).splitlines()[0].startswith("mooncake_conversation_smoke, 4 workers, 7b-h20")
    assert repr(two) == "<Simulation of 2 runs>"


def test_requests_are_columns_that_agree_with_the_figures(two: Simulation) -> None:
    columns = two.requests
    assert {len(column) for column in columns.values()} == {2 * columns["run"].tolist().count(0)}
    trace = simulate(TRACES / "mooncake_conversation_smoke.jsonl.gz", workers=4, window=(0, 40), until=20)
    assert any(math.isnan(latency) for latency in trace.requests["latency"]), "the end came before theirs"
    for number, run in enumerate(two.runs):
        ours = [at for at, one in enumerate(columns["run"]) if one == number]
        # the figures leave out the first fifth
        assert run["requests"] < len(ours)
        latest = [columns["latency"][at] for at in ours][-run["requests"] :]
        assert statistics.fmean(latest) == pytest.approx(run["latency_mean"])


def test_the_same_arguments_give_the_same_figures(two: Simulation) -> None:
    trace = TRACES / "mooncake_conversation_smoke.jsonl.gz"
    again = simulate(trace, workers=[4], scheduler="continuous,slice", window=(0, 40), jobs=1)

    def figures(runs: Simulation) -> list[dict[str, object]]:
        return [{**run, "wall_s": None} for run in runs.runs]

    assert figures(again) == figures(two)
    for name, column in two.requests.items():
        assert again.requests[name].tobytes() == column.tobytes(), name


def test_polars_has_a_row_a_run_or_a_request(two: Simulation) -> None:
    runs = two.to_polars()
    assert runs.height == 2 and runs["scheduler"].to_list() == ["continuous", "slice"]
    requests = two.to_polars(requests=True)
    assert requests.height == len(two.requests["run"])
    assert requests.filter(requests["run"] == 1).height == requests.height // 2


def test_without_polars_it_says_how_to_get_it(two: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match="pip install polars"):
        two.to_polars()


def test_a_page_opens_by_itself(two: Simulation, tmp_path: Path) -> None:
    page = two.plot(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page == two._repr_html_()
    for picture in ("ttft-cdf", "latency-cdf", "imbalance", "batches-1", "lanes-2", "hit-ratio"):
        assert f'<figure id="{picture}"><svg' in page
    assert "<script" not in page and "src=" not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "--trace"),
        ({"trace": "no-such-file"}, "cannot read no-such-file"),
        ({"synthetic": "sharegpt-like"}, "rate"),
        ({"synthetic": "sharegpt-like", "rate": 0}, "rate must be a number above 0: 0"),
        ({"synthetic": "sharegpt-like", "rate": 1, "workers": 0}, "workers must be a whole number of at least 1: 0"),
        ({"synthetic": "sharegpt-like", "rate": 1, "workers": []}, "workers"),
        ({"synthetic": "sharegpt-like", "rate": 1, "policy": "produkt"}, "did you mean product?"),
        ({"synthetic": "sharegpt-like", "rate": 1, "scheduler": "slise"}, "did you mean slice?"),
        ({"synthetic": "sharegpt-like", "rate": math.nan}, "rate must be a number above 0"),
        ({"synthetic": "sharegpt-like", "rate": 1, "cost_model": "7b-h2"}, "did you mean 7b-h20?"),
        ({"synthetic": "sharegpt-like", "rate": 1, "sessions": "half"}, "sessions"),
    ],
)
def test_what_is_wrong_is_a_value_error_of_one_line(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        simulate(**arguments)  # type: ignore[arg-type]
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"trace": object()}, "trace cannot be of type object"),
        ({"trace": b"trace.jsonl"}, "trace cannot be of type bytes"),
        ({"workers": {"a": 1}}, "workers cannot be of type dict"),
        ({"workers": 2j}, "workers cannot be of type complex"),
        ({"window": 5}, "window is a pair of numbers: 5"),
        ({"window": "0:5"}, "window is a pair of numbers"),
        ({"slo": (1, 2, 3)}, "slo is a pair of numbers"),
    ],
)
def test_a_wrong_type_is_a_type_error(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        simulate(**{"synthetic": "sharegpt-like", "rate": 1, **arguments})  # type: ignore[arg-type]


def test_several_values_may_come_in_anything_that_has_an_order() -> None:
    short = {"synthetic": "sharegpt-like", "rate": 2, "seconds": 10}
    runs = simulate(**short, workers=range(1, 3), policy=(name for name in ("product", "jsq")))  # type: ignore[arg-type]
    assert [(run["workers"], run["policy"]) for run in runs.runs] == [
        (1, "product"),
        (1, "jsq"),
        (2, "product"),
        (2, "jsq"),
    ]


def test_threads_run_at_the_same_time() -> None:
    found: list[Simulation] = []

    def one() -> None:
        found.append(simulate(synthetic="agents", rate=1, seconds=30, scheduler="slice", jobs=1))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = [{**runs.runs[0], "wall_s": None} for runs in found]
    assert len(figures) == 4 and all(one == figures[0] for one in figures)


def test_every_scheduler_has_its_host_time() -> None:
    runs = simulate(synthetic="sharegpt-like", rate=2, seconds=20, scheduler=["continuous", "slice", "scls"], host_ms=3)
    assert all(run["host_us_per_token"] > 0 for run in runs.runs)
    assert [run["moves"] is None for run in runs.runs] == [True, False, False]


def test_ctrl_c_ends_it_and_other_threads_run_meanwhile() -> None:
    turns = 0

    def press() -> None:
        nonlocal turns
        for _ in range(50):
            turns += 1
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    began = time.monotonic()
    # a shell's background job is born deaf to it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate(synthetic="sharegpt-like", rate=40, seconds=3000, scheduler="slice", seeds=50, jobs=2)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert turns == 50, "the interpreter was free"
    assert time.monotonic() - began < 60


def test_it_is_loaded_when_first_asked_for() -> None:
    assert scls_router.simulate is simulation.simulate
    assert "simulate" in scls_router.__all__ and "Simulation" in scls_router.__all__
