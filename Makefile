# Short verbs. `make demo` and `make test` need nothing but Python 3.10+, Rust and a C/C++ compiler.
SHELL := /bin/bash
PY := .venv/bin/python
ROUTER := target/debug/scls-router
MODEL ?= models/airline-tiny
WORKERS ?= 2
FIGURES ?= $(wildcard bench/figures/e*.py)
VLLM ?= .venv-vllm
# Tests and demo run on the CPU with a small model: more threads only wait for one another.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false


.PHONY: demo help up test test-versions lint bench bench-core bench-modes bench-peers bench-engine bench-engine-vllm gpu engine-smoke proto clean soak record-runs figures figures-smoke ablation build readme-figures setup rust-test py-test

demo: ## two CPU workers, a router, recorded dialogues
	@tools/setup.sh run
	@$(MAKE) --no-print-directory build
	@$(PY) demo/run.py --router $(ROUTER) --model $(MODEL) --workers $(WORKERS) $(ARGS)

help: ## the verbs
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 16

up: ## serve MODEL with WORKERS workers until Ctrl-C
	@tools/setup.sh run
	@$(MAKE) --no-print-directory build
	@$(ROUTER) up --model $(MODEL) --workers $(WORKERS) --python $(PY)

setup: ## everything the tests need, into .venv
	@tools/setup.sh test

build: ## the router, and both Python packages into .venv
	@tools/setup.sh run
	@echo "==> cargo build (the first time takes some minutes)"
	@cargo build --quiet -p router-server
	@echo "==> Python packages scls-router and scls-worker into .venv"
	@{ VIRTUAL_ENV=$(CURDIR)/.venv .venv/bin/maturin develop --quiet && \
	  $(PY) -m pip install -q --no-deps --no-build-isolation -e workers; } >.venv/build.log 2>&1 || \
	  { cat .venv/build.log >&2; exit 1; }

test: ## everything CI runs
	@tools/setup.sh test
	@$(MAKE) --no-print-directory build
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory rust-test
	@$(MAKE) --no-print-directory py-test
	@$(MAKE) --no-print-directory figures-smoke
	@$(MAKE) --no-print-directory engine-smoke

lint: ## formats, lints, types, layering, generated stubs
	@tools/setup.sh test
	@echo "==> lint: rustfmt, clippy, layering, ruff, mypy, stubtest, generated stubs"
	@cargo fmt --all --check
	@cargo clippy --quiet --workspace --all-targets -- -D warnings
	@! cargo tree -p router-core -e normal --prefix none | grep -E '^(tokio|tonic|pyo3|axum) ' || \
	  { echo "router-core must stay pure: it depends on the crate above" >&2; exit 1; }
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy workers/scls_worker python/scls_router
	@$(PY) -c 'import scls_router' 2>/dev/null || $(MAKE) --no-print-directory build
	@$(PY) -m mypy.stubtest scls_router._native --concise --mypy-config-file pyproject.toml
	@$(PY) tools/gen_proto.py --check

rust-test: ## cargo test
	@echo "==> cargo test"
	@cargo test --quiet --workspace --exclude scls-router-python

py-test: ## pytest
	@echo "==> pytest"
	@$(PY) -m pytest

test-versions: ## the worker's tests with the lowest and the newest torch and transformers (5 GB of disk each)
	@tools/setup.sh test
	@$(MAKE) --no-print-directory build
	@tools/test_versions.sh $(ARGS)

soak: ## the long forms of the tests: the full exactness product, 100,000 event sequences and batches, many kills, fuzzed bodies
	@tools/setup.sh test
	@$(MAKE) --no-print-directory build
	@SCLS_SOAK=1 SCLS_FUZZ=100 cargo test --quiet -p router-server --test fuzz_http --test fuzz_grpc
	@SCLS_SOAK=1 cargo test --quiet -p router-core memory
	@SCLS_SOAK=1 cargo test --quiet -p router-sim --test events --test pooled
	@SCLS_SOAK=1 $(PY) -m pytest -m soak -o timeout=7200

proto: ## Python stubs from proto/ (Rust makes its own in the build)
	@tools/setup.sh test
	@$(PY) tools/gen_proto.py

readme-figures: ## the README's tables from bench/results
	@$(PY) tools/readme_figures.py

bench: bench-core ## bench-core, and the core's look-ups and decisions one by one
	@cargo bench --quiet -p router-core --bench decision --bench cost --bench batching

bench-core: ## text to decision for a later turn of a long conversation; what an event of a row costs the scheduler
	@SCLS_BENCH_JSON=$(CURDIR)/bench/results/handle.json cargo bench --quiet -p router-core --bench handle
	@SCLS_BENCH_JSON=$(CURDIR)/bench/results/core.json cargo bench --quiet -p router-server --bench text

bench-modes: ## sequence level, slice level and ours on real CPU workers, and their bands
	@tools/setup.sh test
	@$(MAKE) --no-print-directory build
	@$(PY) bench/modes.py $(ARGS)

bench-peers: ## ours beside the peers, in an environment of its own (.venv-peers)
	@tools/setup.sh run
	@bench/peers/dynamo_python/run.sh $(ARGS)

bench-engine: ## our worker beside the engines that are installed, shares of the machine's limits, slices against iterations (40 minutes; one part: ARGS=rivals)
	@tools/setup.sh test
	@$(MAKE) --no-print-directory build
	@echo "==> cargo build --release (some minutes the first time)"
	@cargo build --quiet --release -p router-server
	@SCLS_ROUTER_BIN=$(CURDIR)/target/release/scls-router $(PY) bench/engine/run.py --vllm $(VLLM)/bin/python --json bench/results/engine.json $(ARGS)

bench-engine-vllm: ## vLLM for bench-engine, into VLLM (5 GB of disk)
	@tools/setup.sh run
	@bench/engine/peers/install_vllm.sh $(VLLM)

gpu: ## the worker's CUDA path against the GPU's memory, on a CUDA machine (PY=python3: any Python with torch, transformers and both wheels)
	@$(PY) bench/gpu.py --json bench/results/gpu.json $(ARGS)

engine-smoke: ## a short run of bench-engine on a tiny model, and of what `make gpu` runs; nothing written
	@echo "==> engines, in short"
	@$(PY) bench/engine/run.py --smoke >.engine.log 2>&1 || { cat .engine.log >&2; exit 1; }; rm -f .engine.log
	@$(PY) bench/gpu.py --smoke >.gpu.log 2>&1 || { cat .gpu.log >&2; exit 1; }; rm -f .gpu.log

record-runs: ## real fleets on this machine, recorded for `simulate --validate` (6 minutes; leave the machine alone)
	@tools/setup.sh test
	@$(MAKE) --no-print-directory build
	@$(PY) bench/record_run.py $(ARGS)
	@for run in tests/fixtures/runs/*.json.gz; do $(ROUTER) simulate --validate $$run; echo; done

ablation: ## the steps from sequence level to slices, at saturation in virtual time (some minutes)
	@SCLS_BENCH_JSON=$(CURDIR)/bench/results/ablation.json cargo run --quiet --release -p router-sim --example ablation -- $(ARGS)

figures: ## the papers' figures from real traces, in virtual time: all of bench/results/e*.json (hours; one: FIGURES=bench/figures/e3*.py)
	@tools/setup.sh test
	@echo "==> cargo build --release (some minutes the first time)"
	@cargo build --quiet --release -p router-server
	@failed=; for figure in $(FIGURES); do echo "==> $$figure"; \
	  $(PY) $$figure --json bench/results/$$(basename $$figure | cut -d_ -f1).json $(ARGS) || failed="$$failed $$figure"; done; \
	  [ -z "$$failed" ] || { echo "these failed:$$failed" >&2; exit 1; }

figures-smoke: ## a short run of each figure, nothing written
	@echo "==> figures, in short"
	@for figure in $(FIGURES); do SCLS_ROUTER_RELEASE=$(CURDIR)/$(ROUTER) $(PY) $$figure --smoke >.figures.log 2>&1 || \
	  { echo "$$figure --smoke" >&2; cat .figures.log >&2; exit 1; }; done; rm -f .figures.log

clean: ## removes target/ and .venv
	@cargo clean --quiet
	@rm -rf .venv .venv-peers .venv-vllm
