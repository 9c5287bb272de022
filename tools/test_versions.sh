#!/usr/bin/env bash
# The worker's tests with the lowest torch and transformers it supports and with the newest, each pair in an environment
# of its own (.venv-lowest, .venv-newest). Usage: tools/test_versions.sh [lowest|newest]...   (default: both)
# Needs what `make build` makes. Each environment: about 2.8 GB to fetch on Linux, 5 GB on disk; kept for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
ls python/scls_router/_native*.so >/dev/null 2>&1 || { echo "scls_router: the native module is missing: make build" >&2; exit 1; }

# What the worker's package says it needs: torch>=2.11 is tried as torch==2.11.0.
needs=$(sed -n 's/^torch = \[\(.*\)\]$/\1/p' workers/pyproject.toml | tr -d '",')
[ "$#" -gt 0 ] || set -- lowest newest
for which in "$@"; do
  case $which in
    lowest) wanted=$(for need in $needs; do echo "$need" | sed 's/>=\(.*\)/==\1.0/'; done) ;;
    newest) wanted=$needs ;;
    *) echo "scls_router: lowest or newest, not: $which" >&2; exit 1 ;;
  esac
  venv=.venv-$which
  if [ ! -x "$venv/bin/python" ]; then
    echo "==> $venv: fetching about 2.8 GB (5 GB on disk): $(echo $wanted)"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --upgrade "pip>=25.1"
  fi
  # The wanted versions win over the group's own lower bounds; --upgrade moves "newest" on.
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip --disable-pip-version-check install -q --upgrade $wanted --group test
  echo "==> $which: $("$venv/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)')"
  export PYTHONPATH=python:workers
  "$venv/bin/python" -m pytest -p no:cacheprovider workers/tests
  # Of the exactness cases those over real processes that move between two workers.
  "$venv/bin/python" -m pytest -p no:cacheprovider tests/test_exactness.py -k "2-dropped-warm-mixed or 2-held-cold-mixed or seeded"
done
