"""The committed stubs: of the present proto files, and free to be in two packages at once."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scls_worker.proto
from scls_worker.proto import worker_pb2

WORKERS = Path(__file__).resolve().parent.parent


def test_stubs_are_fresh() -> None:
    pytest.importorskip("grpc_tools")
    done = subprocess.run(
        [sys.executable, str(WORKERS / "gen_proto.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_two_packages_may_carry_the_stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(scls_worker.proto.__file__).parent, tmp_path / "other_proto")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("other_proto") is not None
    other = importlib.import_module("other_proto.worker_pb2")
    assert other.RouterMessage(ping=worker_pb2.Ping(nonce=3)).ping.nonce == 3
