"""`make demo`: recorded dialogues through the router and two CPU workers, in a closed loop.

Sixteen conversations run side by side. Each plays the recorded user and tool messages; the model's own answers go into
the history, so the next turn hits what the last one left. One conversation is streamed to the terminal. Then the same
load is played to a round-robin router, and both hit ratios stand beside that of an infinite cache.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 16
MOST_ANSWER = 48
OURS = "product_anticipating"  # the default
HELD_OUT = {f"airline-{task}-{trial}" for task in (4, 14, 23, 33, 45) for trial in (0, 1)}


@dataclass
class Turn:
    conversation: int
    turn: int
    sent: float
    worker: str
    prompt_tokens: int
    cached_tokens: int
    slices: int
    ttft: float
    tokens: int
    seconds: float
    prompt_ids: list[int]
    answer_ids: list[int]


class Router:
    """A router with its workers, ended with the block."""

    def __init__(self, args: argparse.Namespace, policy: str) -> None:
        command = [
            args.router,
            "up",
            "--model",
            args.model,
            "--workers",
            str(args.workers),
            "--python",
            sys.executable,
            "--port",
            "0",
            "--grpc-port",
            "0",
            "--admin-port",
            "0",
            "--policy",
            policy,
            "--log-level",
            "warn",
        ]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout
        for line in self.child.stdout:
            if found := re.search(r"http listening on (.+):(\d+)", line):
                self.host, self.port = found[1], int(found[2])
                break
        else:
            sys.exit(f"demo: the router ended with status {self.child.wait()}")
        threading.Thread(target=self.child.stdout.read, daemon=True).start()
        deadline = time.monotonic() + 120
        while self.ready_workers() < args.workers:
            if time.monotonic() > deadline or self.child.poll() is not None:
                self.__exit__()
                sys.exit("demo: the workers did not come up; see the messages above")
            time.sleep(0.1)

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def ready_workers(self) -> int:
        return len(re.findall(r"^scls_router_worker_ready\{.*\} 1$", self.get("/metrics"), re.M))

    def chat(self, body: dict, on_text) -> dict:
        """Streams one answer; returns its text, token ids, usage and times."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=300)
        began = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            sys.exit(f"demo: status {response.status}: {response.read().decode()}")
        text, ids, prompt, first, last = "", [], [], None, {}
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"demo: {event['error']}")
            prompt = event.get("prompt_token_ids") or prompt
            if event.get("usage"):
                last = event
            for choice in event["choices"]:
                ids += choice.get("token_ids") or []
                piece = choice["delta"].get("content") or ""
                if ids and first is None:
                    first = time.monotonic()
                if piece:
                    text += piece
                    on_text(piece)
        connection.close()
        return {
            "text": text,
            "ids": ids,
            "prompt": prompt,
            "last": last,
            "ttft": (first or began) - began,
            "seconds": time.monotonic() - began,
            "sent": began,
        }

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(40)
            except subprocess.TimeoutExpired:
                self.child.kill()


def dialogues(count: int) -> list[list[dict]]:
    """Sessions of the corpus, first those that the model was not trained on."""
    with gzip.open(ROOT / "models/corpus/airline_dialogues.jsonl.gz", "rt") as lines:
        sessions = [json.loads(line) for line in lines]
    sessions.sort(key=lambda session: session["session"] not in HELD_OUT)
    return [session["messages"] for session in sessions[:count]]


def play(router: Router, name: str, conversation: int, messages: list[dict], turns: int, show: bool) -> list[Turn]:
    """One conversation: each recorded user or tool message, and the model's answer to it."""
    history: list[dict] = [m for m in messages[:1] if m["role"] == "system"]
    out: list[Turn] = []
    for message in messages:
        if message["role"] not in ("user", "tool") or len(out) == turns:
            continue
        history.append({"role": message["role"], "content": message["content"] or ""})
        if show:
            print(f"\n\033[1m{message['role']}\033[0m  {' '.join((message['content'] or '').split())[:300]}")
            print("\033[1massistant\033[0m  ", end="", flush=True)
        body = {
            "model": name,
            "messages": history,
            "max_tokens": MOST_ANSWER,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        answer = router.chat(body, (lambda piece: print(piece, end="", flush=True)) if show else lambda _: None)
        if show:
            print()
        history.append({"role": "assistant", "content": answer["text"]})
        usage, own = answer["last"]["usage"], answer["last"].get("scls", {})
        out.append(
            Turn(
                conversation,
                len(out),
                answer["sent"],
                own.get("worker", "?"),
                usage["prompt_tokens"],
                (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
                own.get("slices", 0),
                answer["ttft"],
                usage["completion_tokens"],
                answer["seconds"],
                answer["prompt"],
                answer["ids"],
            )
        )
    return out


def ideal(turns: list[Turn]) -> int:
    """Prompt tokens that one cache without end would have hit: whole blocks of any earlier prompt or answer."""
    known: set[tuple[int, ...]] = set()
    hit = 0
    for turn in sorted(turns, key=lambda t: t.sent):
        ids = turn.prompt_ids
        most = (len(ids) - 1) // BLOCK
        depth = next((i for i in range(most) if tuple(ids[: (i + 1) * BLOCK]) not in known), most)
        hit += depth * BLOCK
        whole = ids + turn.answer_ids
        known |= {tuple(whole[: (i + 1) * BLOCK]) for i in range(len(whole) // BLOCK)}
    return hit


def run(args: argparse.Namespace, policy: str, show: bool) -> list[Turn]:
    with Router(args, policy) as router:
        name = json.loads(router.get("/v1/models"))["data"][0]["id"]
        sessions = dialogues(args.conversations)
        with ThreadPoolExecutor(len(sessions)) as pool:
            runs = [pool.submit(play, router, name, i, m, args.turns, show and i == 0) for i, m in enumerate(sessions)]
            return [turn for run in runs for turn in run.result()]


def table(turns: list[Turn]) -> None:
    print("\nconversation turn  worker   prompt  cached  slices   TTFT ms  tokens  tok/s")
    for t in sorted(turns, key=lambda t: (t.conversation, t.turn)):
        rate = t.tokens / max(t.seconds, 1e-9)
        print(
            f"{t.conversation:>12} {t.turn:>4}  {t.worker:<7} {t.prompt_tokens:>7} {t.cached_tokens:>7} {t.slices:>7}"
            f" {t.ttft * 1e3:>9.0f} {t.tokens:>7} {rate:>6.1f}"
        )


def summary(name: str, turns: list[Turn]) -> dict[str, float]:
    prompt = sum(t.prompt_tokens for t in turns)
    cached = sum(t.cached_tokens for t in turns)
    best = ideal(turns)
    ttft = sorted(t.ttft for t in turns)
    out = {
        "hit": cached / prompt,
        "ideal": best / prompt,
        "of_ideal": cached / max(best, 1),
        "ttft_ms": 1e3 * sum(ttft) / len(ttft),
        "p95_ms": 1e3 * ttft[int(0.95 * (len(ttft) - 1))],
        "tokens": sum(t.tokens for t in turns),
    }
    print(
        f"{name:<20} {out['hit']:>9.3f} {out['ideal']:>15.3f} {out['of_ideal']:>9.3f}"
        f" {out['ttft_ms']:>13.0f} {out['p95_ms']:>12.0f} {out['tokens']:>9.0f}"
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", default=str(ROOT / "target/debug/scls-router"))
    parser.add_argument("--model", default=str(ROOT / "models/airline-tiny"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the summary here too")
    args = parser.parse_args()
    if not Path(args.model, "tokenizer.json").exists():
        sys.exit(f"demo: no tokenizer in {args.model}")

    print(f"==> {args.conversations} conversations of {args.turns} turns, {args.workers} workers, policy {OURS}")
    ours = run(args, OURS, show=True)
    table(ours)
    print("\n==> the same load, policy round_robin")
    robin = run(args, "round_robin", show=False)
    print(
        f"\n{'policy':<20} {'hit ratio':>9} {'infinite cache':>15} {'share':>9} {'mean TTFT ms':>13} {'p95 TTFT ms':>12}"
        f" {'tokens':>9}"
    )
    result = {OURS: summary(OURS, ours), "round_robin": summary("round_robin", robin)}
    if args.json:
        args.json.write_text(json.dumps(record(args, result), indent=1) + "\n")


def record(args: argparse.Namespace, result: dict[str, dict[str, float]]) -> dict:
    """The run as a file of bench/results, see ARCHITECTURE.md."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    share = result[OURS]["of_ideal"]
    return {
        "name": "demo",
        "command": f"make demo ARGS='--conversations {args.conversations} --turns {args.turns} --json FILE'",
        "commit": commit.stdout.strip(),
        "when": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "gpu": None},
        "seed": None,
        "rows": [{"policy": policy, **numbers} for policy, numbers in result.items()],
        "goals": [
            {
                "goal": "hit ratio over the infinite cache's",
                "value": share,
                "op": ">=",
                "bound": 0.9,
                "holds": share >= 0.9,
            }
        ],
    }


if __name__ == "__main__":
    main()
