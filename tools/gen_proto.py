"""Generates the Python protobuf stubs from proto/ into scls_router.proto, for clients and workers. `--check` compares
instead.

The stubs are committed, so nobody needs protoc to install or to read them.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "proto/scls/v1").glob("*.proto"))
TARGET = ROOT / "python/scls_router/proto"

INIT = '"""Generated protobuf and gRPC stubs of proto/scls/v1; `make proto` writes them."""\n'
# The generators refuse every runtime older than themselves, though this code uses nothing younger than the floors in
# pyproject.toml. Those floors are the check; the generated ones would shut out users for the version of our protoc.
PROTOBUF_CHECK = re.compile(
    r"from google\.protobuf import runtime_version as _runtime_version\n|"
    r"_runtime_version\.ValidateProtobufRuntimeVersion\(.*?^\)\n|^# Protobuf Python Version[^\n]*\n",
    re.S | re.M,
)
GRPC_CHECK = re.compile(r"^GRPC_GENERATED_VERSION.*?^ {4}\)\n", re.S | re.M)


def fit(text: str) -> str:
    """Imports between stubs name their own package, not a top-level `scls`; what protoc leaves untyped is no error."""
    text = re.sub(r"^from scls\.v1 import", "from . import", text, flags=re.M)
    text = text.replace("import warnings\n", "")
    return "# mypy: ignore-errors\n" + GRPC_CHECK.sub("", PROTOBUF_CHECK.sub("", text))


def generate() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as out:
        status = protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'proto'}",
                *(f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")),
                *map(str, SOURCES),
            ]
        )
        if status:
            sys.exit(status)
        files = {"__init__.py": INIT}
        for path in sorted(Path(out, "scls/v1").iterdir()):
            text = fit(path.read_text())
            # A file without services has an empty gRPC stub: nothing to keep.
            if path.name.endswith("_grpc.py") and "class " not in text:
                continue
            files[path.name] = text
        return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="name stale files and exit 1; write nothing")
    check = parser.parse_args().check
    stale = []
    files = generate()
    present = {p.name for p in TARGET.glob("*.py*")} if TARGET.is_dir() else set()
    for name in sorted(files.keys() | present):
        path = TARGET / name
        if path.is_file() and path.read_text() == files.get(name):
            continue
        stale.append(path.relative_to(ROOT))
        if check:
            continue
        TARGET.mkdir(parents=True, exist_ok=True)
        if name in files:
            path.write_text(files[name])
        else:
            path.unlink()
    if check and stale:
        sys.exit("stale stubs, run `make proto`:\n" + "\n".join(f"  {path}" for path in stale))


if __name__ == "__main__":
    main()
