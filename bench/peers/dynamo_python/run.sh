#!/usr/bin/env bash
# Measures our Python module beside the ai-dynamo-runtime wheel, both in .venv-peers. Arguments go to bench.py.
set -euo pipefail
cd "$(dirname "$0")/../../.."
requirements=bench/peers/dynamo_python/requirements.txt
stamp=.venv-peers/.scls-peers
if [ ! -f "$stamp" ] || ! cmp -s "$requirements" "$stamp"; then
  echo "==> .venv-peers with $(grep dynamo "$requirements") (a download of 75 MB, once)"
  .venv/bin/python -m venv --clear .venv-peers
  .venv-peers/bin/python -m pip --disable-pip-version-check install -q -r "$requirements"
  cp "$requirements" "$stamp"
fi
echo "==> our wheel, built for release (the first time takes some minutes)"
rm -rf target/peers
VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin build --quiet --release --out target/peers
.venv-peers/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-index --force-reinstall target/peers/*.whl
exec .venv-peers/bin/python bench/peers/dynamo_python/bench.py "$@"
