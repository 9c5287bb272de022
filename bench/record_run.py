"""`make record-runs`: real fleets on loopback, recorded so that the simulator can be held to them.

A recording says what was asked (when, which prompt goes on from which, the limit), what happened (first token, end, worker,
cached tokens), what each worker announced, what each batch computed and took, and on how busy a machine. Prompts
themselves are not kept: of each only which earlier request it goes on from, how many tokens they share, and how many are
new. Every workload is run several times on a fresh fleet, so that the spread of the runs themselves is known.

Before a run a few requests of one token are sent one by one: what they take beyond their iteration is what everything
around the workers takes, and the simulator adds that much and no more.

`scls-router simulate --validate FILE` replays a recording.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "demo"), str(ROOT / "workers")]

import grpc  # noqa: E402
from google.protobuf.json_format import MessageToDict  # noqa: E402
from harness import MODEL, ROUTER, Router, RustMock  # noqa: E402
from machine import busy_share, git_commit, machine  # noqa: E402
from run import MOST_ANSWER, dialogues  # noqa: E402
from scls_router.proto import router_pb2, router_pb2_grpc  # noqa: E402
from scls_worker.mock import next_token  # noqa: E402

FORMAT = "scls-router run 1"
FIXTURES = ROOT / "tests/fixtures/runs"
PROBES = 8
VOCAB = 2000


@dataclass
class Asked:
    """A request as it was sent and answered; times in microseconds from the run's start."""

    session: int
    turn: int
    prompt: list[int]
    limit: int
    arrived: int
    answer: list[int] = field(default_factory=list)
    first: int = 0
    ended: int = 0
    gap: int = 0
    stopped: bool = False
    cached: int = 0
    slices: int = 0
    worker: str = ""


class Run:
    """One fleet and all that is asked of it."""

    def __init__(self, router: Router, model: str, pause: float) -> None:
        self.router, self.model, self.pause = router, model, pause
        self.asked: list[Asked] = []
        self.batches: dict[tuple[str, int], dict[str, Any]] = {}
        self.probes: list[list[int]] = []
        self.began = time.monotonic_ns()
        self.lock = threading.Lock()

    def now(self) -> int:
        return (time.monotonic_ns() - self.began) // 1000

    def ask(self, path: str, session: int, turn: int, body: dict[str, Any]) -> Asked:
        """Streams one answer."""
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **body,
        }
        data = json.dumps(body)
        asked = Asked(session, turn, [], body["max_tokens"], self.now())
        connection = self.router.connect(300)
        try:
            connection.request("POST", path, data, {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {response.read().decode()[:300]}")
            self._read(response, asked, body)
        finally:
            connection.close()
        if not asked.answer or not asked.ended:
            raise RuntimeError("an answer without tokens")
        with self.lock:
            self.asked.append(asked)
        return asked

    def _read(self, response: http.client.HTTPResponse, asked: Asked, body: dict[str, Any]) -> None:
        last = 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now = self.now()
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            asked.prompt = event.get("prompt_token_ids") or asked.prompt
            if usage := event.get("usage"):
                own = event.get("scls", {})
                asked.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                asked.slices, asked.worker = own.get("slices", 0), own.get("worker", "")
            for choice in event["choices"]:
                if ids := choice.get("token_ids"):
                    asked.answer += ids
                    asked.first = asked.first or now
                    asked.gap = max(asked.gap, now - last if last else 0)
                    asked.ended = last = now
                if choice.get("finish_reason"):
                    asked.stopped = choice["finish_reason"] == "stop"
        if not asked.prompt:
            asked.prompt = body["prompt"]

    def play(self, workload: Callable[[Run], None]) -> None:
        """Plays it, and takes the batches on the way before the router forgets them."""
        with ThreadPoolExecutor(1) as thread:
            played = thread.submit(workload, self)
            while not wait([played], 2).done:
                self.collect()
            played.result()

    def collect(self) -> None:
        """The batches that ended since the last time: the router keeps only the latest."""
        ended = (batch for batch in self.router.admin("/batches")["batches"] if batch["outcome"])
        with self.lock:
            self.batches.update(((batch["worker"], batch["batch"]), batch) for batch in ended)

    def probe(self, path: str, make: Callable[[int], dict[str, Any]]) -> None:
        """Single requests of one token: how much longer each takes than its one iteration."""
        for at in range(PROBES):
            time.sleep(self.pause)
            before = set(self.batches)
            asked = self.ask(path, -1, at, {**make(at), "max_tokens": 1})
            self.router.wait_drained()
            self.collect()
            new = [self.batches[key] for key in self.batches.keys() - before]
            if len(new) == 1 and new[0]["outcome"]["steps"] == 1:
                self.probes.append([asked.first - asked.arrived, new[0]["outcome"]["time_us"]])

    def workers(self) -> list[dict[str, Any]]:
        with grpc.insecure_channel(self.router.addresses["grpc"]) as channel:
            stub = router_pb2_grpc.RouterStub(channel)  # type: ignore[no-untyped-call]
            listed = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=10)
        out = [described(worker.info) for worker in listed.workers]
        return sorted(out, key=lambda worker: str(worker["id"]))

    def record(self) -> dict[str, Any]:
        self.router.wait_drained()
        self.collect()
        workers = self.workers()
        names = {worker["id"]: at for at, worker in enumerate(workers)}
        asked = sorted(self.asked, key=lambda one: one.arrived)
        requests = [
            {
                **origin(asked, at),
                "session": one.session,
                "turn": one.turn,
                "limit": one.limit,
                "output": len(one.answer),
                "stopped": one.stopped,
                "arrived_us": one.arrived,
                "first_us": one.first,
                "ended_us": one.ended,
                "gap_us": one.gap,
                "worker": names.get(one.worker),
                "cached": one.cached,
                "slices": one.slices,
            }
            for at, one in enumerate(asked)
        ]
        batches = [
            {"worker": names[batch["worker"]], "at_us": batch["at_us"], "rows": batch["rows"], "limit": batch["steps"]}
            | {name: batch["outcome"][name] for name in OUTCOME}
            for batch in sorted(self.batches.values(), key=lambda batch: batch["at_us"])
        ]
        return {"workers": workers, "probes_us": self.probes, "requests": requests, "batches": batches}


OUTCOME = ["end", "steps", "time_us", "fills", "prefill_tokens", "pairs", "decoded_tokens", "context_tokens"]
OUTCOME += ["longest_tokens"]


def described(info: Any) -> dict[str, Any]:
    """What a worker announced, the cost model as files have it."""
    model = info.cost_model
    form = model.WhichOneof("form")
    cost: dict[str, Any] | None = None
    if form == "paged":
        of = model.paged
        prefill = {"constant": of.prefill_constant_s, "per_token": of.prefill_per_token_s}
        prefill["per_pair"] = of.prefill_per_pair_s
        step = {
            "constant": of.step_constant_s,
            "per_row": of.step_per_row_s,
            "per_context": of.step_per_context_token_s,
        }
        cost = {"layout": "paged", "prefill": prefill, "step": step}
    elif form == "padded":
        parts = MessageToDict(model.padded, preserving_proto_field_name=True)
        names = ["constant", "per_row", "per_position", "per_cell"]
        both = {
            part: {name: parts.get(part, {}).get(f"{name}_s", 0.0) for name in names} for part in ("prefill", "step")
        }
        cost = {"layout": "padded", **both}
    return {
        "id": info.worker_id,
        "engine": info.engine,
        "device": info.device,
        "block_size": info.block_size,
        "blocks": info.blocks,
        "max_rows": info.max_rows,
        "max_context": info.max_context,
        "chunk_tokens": info.chunk_tokens,
        "vocab": info.vocab_size,
        "cost_model": cost,
    }


def origin(asked: Sequence[Asked], at: int) -> dict[str, Any]:
    """Which earlier request's prompt and answer this one shares most tokens with, how many, and how many follow."""
    mine = asked[at].prompt
    keep, parent = 0, None
    for i in range(at):
        theirs = asked[i].prompt + asked[i].answer
        same = shared(mine, theirs)
        # of those that share as much the latest: its answer may be part of it
        if same and same >= keep:
            keep, parent = same, i
    return {"parent": parent, "keep": keep, "new": len(mine) - keep}


def shared(a: list[int], b: list[int]) -> int:
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


# ---------------------------------------------------------------- workloads


def play_demo(run: Run) -> None:
    """The dialogues of `make demo`: each turn when the answer before it is there."""
    run.probe("/v1/chat/completions", lambda at: {"messages": [{"role": "user", "content": f"{at} " * 40}]})

    def play(session: int, messages: list[dict[str, Any]]) -> None:
        history = [m for m in messages[:1] if m["role"] == "system"]
        turn = 0
        for message in messages:
            if message["role"] not in ("user", "tool") or turn == 4:
                continue
            history.append({"role": message["role"], "content": message["content"] or ""})
            body = {"messages": history, "max_tokens": MOST_ANSWER, "temperature": 0}
            answer = run.ask("/v1/chat/completions", session, turn, body)
            history.append({"role": "assistant", "content": text_of(run, answer)})
            turn += 1

    sessions = dialogues(40)
    together([lambda s=s, m=m: play(s, m) for s, m in enumerate(sessions)])


def text_of(run: Run, asked: Asked) -> str:
    return str(run.router.post("/detokenize", {"model": run.model, "tokens": asked.answer})["prompt"])


def play_burst(run: Run) -> None:
    """All at once on CPU workers, with answers that end by themselves."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 500) for _ in range(draw.randrange(8, 200))] for _ in range(160)]
    run.probe("/v1/completions", lambda at: {"prompt": [3 + at, *prompts[at]], "temperature": 0})

    def play(at: int) -> None:
        body = {"prompt": prompts[at], "max_tokens": 256, "temperature": 1.0, "seed": at}
        run.ask("/v1/completions", at, 0, body)

    together([lambda at=at: play(at) for at in range(len(prompts))])


def play_mock(run: Run, rate: float, seconds: float) -> None:
    """Sessions that come as they like, on workers whose time is known: each turn some time after the last answer."""
    draw = random.Random(9)
    templates = [[draw.randrange(3, VOCAB) for _ in range(n)] for n in (96, 256, 512)]
    run.probe("/v1/completions", lambda at: {"prompt": [3 + at, *templates[1]], "temperature": 0})
    starts: list[tuple[float, random.Random]] = []
    at = 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        starts.append((at, random.Random(draw.randrange(1 << 30))))

    def play(session: int, start: float, own: random.Random) -> None:
        time.sleep(max(0.0, start - (run.now() - base) / 1e6))
        prompt = list(own.choice(templates))
        for turn in range(own.randrange(1, 5)):
            prompt += [own.randrange(3, VOCAB) for _ in range(int(min(600, 4 + own.lognormvariate(4.4, 0.9))))]
            length = int(min(200, 1 + own.lognormvariate(3.4, 0.8)))
            stop = eos_of(prompt, length)
            ends = {"stop_token_ids": [stop], "min_tokens": length - 1}
            answer = run.ask("/v1/completions", session, turn, {"prompt": prompt, "max_tokens": 256, **ends})
            prompt = prompt + answer.answer
            time.sleep(own.expovariate(1.0))

    base = run.now()
    together([lambda s=s, one=one: play(s, *one) for s, one in enumerate(starts)])


def eos_of(prompt: list[int], length: int) -> int:
    """The token that a mock draws at this place of its answer."""
    last = prompt[-1]
    for position in range(len(prompt) - 1, len(prompt) - 1 + length):
        last = next_token(last, position, VOCAB)
    return last


def together(plays: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(plays)) as threads:
        for done in [threads.submit(play) for play in plays]:
            done.result()


# ---------------------------------------------------------------- fleets


@dataclass(frozen=True)
class Workload:
    """A fleet and what is played to it."""

    play: Callable[[Run], None]
    mocks: int = 0
    layout: str = "paged"
    flags: tuple[str, ...] = ()
    # Between probes: a pool forms no round sooner than this.
    pause: float = 0.0

    def fleet(self, stack: ExitStack) -> Router:
        if not self.mocks:
            up = ["--model", str(MODEL), "--workers", "1", "--python", sys.executable, "--log-level", "warn"]
            up += ["--cost-model", str(calibrated())]
            router = stack.enter_context(Router([], *up, *self.flags, ready=0, command="up"))
            router.wait_ready(1, 120)
            return router
        timing = ["--step-us", "20000", "--row-us", "400", "--prefill-us-per-token", "120", "--vocab", str(VOCAB)]
        made = [RustMock(*timing, "--layout", self.layout, "--worker-id", f"mock-{i}") for i in range(self.mocks)]
        for one in made:
            stack.callback(one.stop)
        return stack.enter_context(Router([one.url for one in made], "--log-level", "warn", *self.flags))

    @property
    def scheduler(self) -> str:
        return self.flags[self.flags.index("--scheduler") + 1] if "--scheduler" in self.flags else "slice"


WORKLOADS = {
    "demo_cpu": Workload(play_demo),
    "burst_cpu": Workload(play_burst),
    "mock_4_workers": Workload(lambda run: play_mock(run, 14, 10), mocks=4),
    "mock_4_workers_ils": Workload(lambda run: play_mock(run, 14, 10), mocks=4, flags=("--scheduler", "ils")),
    "mock_4_workers_scls": Workload(
        lambda run: play_mock(run, 3, 10), mocks=4, layout="padded", flags=("--scheduler", "scls"), pause=1.1
    ),
}


@functools.cache
def calibrated() -> Path:
    """What iterations of the CPU worker cost on this machine, measured once for all fleets."""
    out = Path(tempfile.mkdtemp(prefix="scls-record-")) / "cost-model.json"
    command = [ROUTER, "calibrate", "--model", str(MODEL), "--python", sys.executable, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def once(workload: Workload) -> dict[str, Any]:
    load, busy = os.getloadavg()[0], busy_share()
    with ExitStack() as stack:
        router = workload.fleet(stack)
        model = json.loads(router.request("GET", "/v1/models")[2])["data"][0]["id"]
        run = Run(router, model, workload.pause)
        run.play(workload.play)
        return {"load_before": load, "busy_before": busy, **run.record()}


def patiently(workload: Workload) -> dict[str, Any]:
    """A run; once more if the fleet did not come up or an answer broke off."""
    try:
        return once(workload)
    except (OSError, RuntimeError, AssertionError) as error:
        print(f"a run failed and is made again: {error}", file=sys.stderr, flush=True)
        return once(workload)


def record(name: str, runs: int) -> dict[str, Any]:
    workload = WORKLOADS[name]
    made = []
    # the mocks take what they say; of the others one run more tells what iterations cost in company
    first = 0 if workload.mocks else -1
    for at in range(first, runs):
        run = patiently(workload)
        made.append(run)
        told = [r for r in run["requests"] if r["session"] >= 0]
        seconds = (max(r["ended_us"] for r in told) - min(r["arrived_us"] for r in told)) / 1e6
        tokens = sum(r["output"] for r in told)
        ttft = statistics.mean(r["first_us"] - r["arrived_us"] for r in told) / 1e3
        print(
            f"{name} {f'{at + 1}/{runs}' if at >= 0 else 'calibration'}: {len(told)} requests, {len(run['batches'])} batches, {seconds:.1f} s,"
            f" {tokens / seconds:.0f} tokens/s, mean TTFT {ttft:.1f} ms, busy before {run['busy_before']:.0%}",
            flush=True,
        )
    return {
        "format": FORMAT,
        "name": name,
        "command": "make record-runs",
        "commit": git_commit(),
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "scheduler": workload.scheduler,
        "policy": "product",
        "calibration": None if workload.mocks else made[0],
        "runs": made[-runs:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORKLOADS)}; all if none is given")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FIXTURES)
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in WORKLOADS]:
        parser.error(f"no such workload: {unknown[0]}\nworkloads: {', '.join(WORKLOADS)}")
    if args.runs < 1:
        parser.error("--runs: at least one")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or WORKLOADS:
        text = json.dumps(record(name, args.runs), separators=(",", ":"))
        path = args.out / f"{name}.json.gz"
        # no time stamp inside: the same recording is the same file
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
            packed.write(text.encode())
        print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
