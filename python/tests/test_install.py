"""sdist → wheel → every CPython from 3.10 that is found here: what a user who installs the package gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import scls_router

ROOT = Path(__file__).parents[2]
# Where the router was built before: an interpreter's own build of all dependencies would take minutes.
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
# Compiled here a second time, from the sdist's copy: quickly, as nobody runs it for its speed. Their dependencies are not.
CRATES = ("router-core", "router-sim", "router-server", "scls-router-python")
QUICKLY = [f"--config=profile.dev.package.{crate}.{o}" for crate in CRATES for o in ("opt-level=0", "debug=false")]
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MYPY"))}

SMOKE = """
import sys, time
began = time.perf_counter()
import scls_router
took = time.perf_counter() - began
heavy = {"torch", "grpc", "numpy", "google", "transformers"} & set(sys.modules)
assert not heavy, f"import scls_router brings {heavy}"
router = scls_router.Router()
router.add_worker("a", blocks=100)
router.add_worker("b", blocks=100)
first = router.route(list(range(64)))
assert router.prefilled(first) and router.finished(first, [1, 2])
assert router.route(range(64), commit=False).worker == first.worker
assert scls_router.hash_blocks(0, [0] * 16, 16) == [3457472693978015086]
print(f"{sys.version.split()[0]}: import took {took * 1000:.0f} ms")
"""


def run(*args: str | Path, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(args, cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def interpreters() -> dict[str, str]:
    """The CPythons found, by minor version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in range(10, 20))]
    names += sorted(str(path) for path in pyenv.glob("3.*/bin/python"))
    found: dict[str, str] = {}
    for name in filter(None, names):
        ask = "import sys, venv; print(sys.implementation.name, *sys.version_info[:2])"
        try:
            answer = subprocess.run([name, "-c", ask], env=ENV, capture_output=True, text=True, timeout=60)
        except OSError:
            continue
        kind, *version = answer.stdout.split() or ["none"]
        if kind == "cpython" and int(version[1]) >= 10:
            found.setdefault(".".join(version), name)
    return found


FOUND = interpreters()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "maturin", "sdist", "-o", out, cwd=ROOT)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist's files alone, with the dependencies that are compiled already."""
    sources = TARGET / "sdist"
    unpack(sdist, sources)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "maturin", "build", "--profile", "dev", "--locked", "-i", sys.executable, "-o", out]
    run(*build, *QUICKLY, cwd=next(sources.glob("scls_router-*")), CARGO_TARGET_DIR=str(TARGET), VIRTUAL_ENV=sys.prefix)
    return next(out.glob("*.whl"))


def unpack(sdist: Path, sources: Path) -> None:
    """Writes what changed, deletes what is gone: unchanged files keep their time, and cargo what it made of them."""
    with tarfile.open(sdist) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        for name, file in files.items():
            assert file is not None
            path, content = sources / name, file.read()
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    for path in sources.rglob("*"):
        if path.is_file() and str(path.relative_to(sources)) not in files:
            path.unlink()


@pytest.mark.timeout(1200)
def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "_native.pyi", "__init__.py"):
        assert f"scls_router/{name}" in names
    assert not [name for name in names if name.startswith(("workers", "scls_worker", "tests"))]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(10, 15)])
def test_it_installs_imports_and_routes(version: str, wheel: Path, tmp_path: Path) -> None:
    if version not in FOUND:
        pytest.skip(f"no CPython {version} on PATH or in pyenv")
    home = tmp_path / "venv"
    run(FOUND[version], "-m", "venv", "--without-pip", home)
    python = home / "bin" / "python"
    # Without whatever else the package may use: the router itself needs nothing.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run(*pip, "install", "-q", "--no-index", "--no-deps", str(wheel))
    print(run(python, "-I", "-c", SMOKE).strip())
    shown = run(home / "bin" / "scls-router", "version")
    assert scls_router.__version__ in shown
