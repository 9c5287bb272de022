#!/usr/bin/env bash
# Makes .venv with what the project needs and says what it does. Usage: tools/setup.sh run|test
# Nothing is done twice: a stamp remembers the group and the dependency file it was made from.
set -euo pipefail
cd "$(dirname "$0")/.."
group=${1:?group}

need() { echo "scls_router: $1" >&2; exit 1; }

command -v cargo >/dev/null || need "cargo is missing: install Rust 1.90 or newer (https://rustup.rs)"
command -v cc >/dev/null || need "no C compiler (cc): install gcc or clang"
command -v c++ >/dev/null || need "no C++ compiler (c++): install g++ or clang++"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || need "$python is missing: install Python 3.10 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  need "Python 3.10 or newer is needed, $python is $("$python" -c 'import platform; print(platform.python_version())')"
"$python" -c 'import venv, ensurepip' 2>/dev/null || need "$python has no venv module: install it (Debian: python3-venv)"
cargo_version=$(cargo --version | cut -d' ' -f2)
[ "$(printf '%s\n1.90.0\n' "$cargo_version" | sort -V | head -n1)" = 1.90.0 ] ||
  need "Rust 1.90 or newer is needed, cargo is $cargo_version: rustup update"

stamp=.venv/.scls-$group
sum=$(cat pyproject.toml tools/setup.sh | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && exit 0
[ "$group" = run ] && [ -f .venv/.scls-test ] && [ "$(cat .venv/.scls-test)" = "$sum" ] && exit 0

if [ ! -x .venv/bin/python ]; then
  if "$python" -c 'import torch, sys; v = torch.__version__.split("+")[0].split("."); sys.exit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null; then
    echo "==> .venv on top of the installed torch $("$python" -c 'import torch; print(torch.__version__)')"
    "$python" -m venv --system-site-packages .venv
  else
    echo "==> .venv"
    "$python" -m venv .venv
  fi
fi
pip=".venv/bin/python -m pip --disable-pip-version-check"
$pip install -q --upgrade "pip>=25.1"
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "==> torch is not installed: fetching it (Linux: about 2.8 GB with its CUDA libraries, 6 GB on disk; a minute or more)"
  $pip install "torch>=2.11" --progress-bar off -q
fi
echo "==> Python packages ($group)"
$pip install -q --group "$group"
printf '%s' "$sum" >"$stamp"
