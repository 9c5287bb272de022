"""What the README shows is run: its Python, its curl lines, and its commands as far as they start nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from harness import MODEL, ROOT, ROUTER, Router, Worker

TEXT = (ROOT / "README.md").read_text()
USES = TEXT[TEXT.index("## Three ways") : TEXT.index("## Workers")]
PYTHON = re.findall(r"^```python\n(.*?)^```", USES, flags=re.S | re.M)
# A command goes on until the next one: bodies of requests have several lines.
COMMANDS = [
    command.split(" # ")[0].strip()
    for block in re.findall(r"^```console\n(.*?)^```", TEXT, flags=re.S | re.M)
    for command in re.findall(r"^\$ (.*?)(?=^\$ |\Z)", block, flags=re.S | re.M)
]


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    """What the README's `up` starts, on free ports."""
    with Worker("--model", str(MODEL)) as worker, Router([worker.url]) as router:
        yield router


def here(text: str, router: Router) -> str:
    return text.replace("localhost:30000", router.addresses["http"]).replace(
        "localhost:30001", router.addresses["grpc"]
    )


def name_of(code: str) -> str:
    return re.sub(r"\W+", "-", code.strip().split("\n")[0])[:50]


@pytest.mark.parametrize("code", PYTHON, ids=name_of)
def test_python(code: str, router: Router) -> None:
    exec(compile(here(code, router), "README.md", "exec"), {})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("curl")], ids=lambda c: c.split()[1])
def test_curl(command: str, router: Router) -> None:
    done = subprocess.run(
        ["bash", "-c", here(command, router).replace("curl ", "curl -sS --fail-with-body --max-time 30 ", 1)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout
    if '"stream": true' in command:
        assert done.stdout.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("scls-router")])
def test_commands(command: str, router: Router) -> None:
    """What would serve is checked by `config check`, which takes the same flags."""
    words = shlex.split(command)[1:]
    if words[0] in ("up", "serve"):
        words = ["config", "check", *words[1:]]
    elif words[0] == "health":
        words += ["--url", "http://" + router.addresses["http"]]
    done = subprocess.run([ROUTER, *words], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_else_is_shown() -> None:
    """The other commands: `make` is CI's, and what needs machines or programs that are not here."""
    others = [c for c in COMMANDS if not c.startswith(("curl", "scls-router", "make "))]
    assert [c.split()[0] for c in others] == ["source", "python", "grpcurl"]
    assert len(PYTHON) == 3
