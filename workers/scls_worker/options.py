"""Command-line options and what is built from them: the runner, the pool's size, what the worker says of itself.

Raw flags become checked values here, once. Knows torch only by way of `model`, and that only when a model is served.
"""

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

from scls_router.proto import common_pb2 as common

from . import __version__, cost
from .engine import Runner
from .errors import StartupError
from .folder import check_folder, check_tokenizer
from .info import digest, tokenizer_files, worker_info
from .mock import EOS_ID, FIRST_ID, MockRunner

MOCK_CONTEXT = 8192
MOCK_VOCAB = 32000
# Rows of full length that the default pool holds, where memory does not set it.
CONTEXTS_A_POOL = 4


class Served(NamedTuple):
    runner: Runner
    info: common.WorkerInfo  # without a cost model, unless it is known beforehand
    tokenizer: list[Path]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"not a positive number: {text}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a negative number: {text}")
    return value


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scls-worker", description="Serves one model, slice by slice, to one router.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, metavar="DIR", help="folder with config.json, *.safetensors, tokenizer.json"
    )
    what.add_argument("--mock", action="store_true", help="no model: the next token is a hash of the last")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1. Whoever reaches it may use it"
    )
    parser.add_argument("--port", type=natural, default=0, help="default: 0, which picks a free one")
    parser.add_argument("--worker-id", default="", help="its name; default: a random one")
    parser.add_argument(
        "--served-name",
        action="append",
        metavar="NAME",
        help="model name it serves; may be repeated; default: the folder's name",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda where there is one"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument(
        "--layout",
        choices=("paged", "padded"),
        default="paged",
        help="paged: rows in blocks, KV kept between slices. padded: one rectangle a batch; default: paged",
    )
    parser.add_argument(
        "--block-size", type=positive, default=16, metavar="TOKENS", help="tokens a KV block; default: 16"
    )
    parser.add_argument("--blocks", type=positive, metavar="N", help="KV blocks; default: from memory")
    parser.add_argument(
        "--max-rows", type=positive, default=64, metavar="N", help="most rows of one batch; default: 64"
    )
    parser.add_argument(
        "--chunk-tokens", type=positive, default=512, metavar="N", help="most prefill tokens an iteration; default: 512"
    )
    parser.add_argument(
        "--max-context", type=positive, metavar="N", help="cap of prompt and output together; default: the model's"
    )
    parser.add_argument(
        "--cost-model",
        type=Path,
        metavar="FILE",
        help="what iterations cost here, of --calibrate; default: a short look at the start",
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure what iterations cost here, write it and exit"
    )
    parser.add_argument(
        "--eager", action="store_true", help="transformers' own code for every pass; default: compiled where it can be"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="compute threads; default: torch's choice")
    parser.add_argument(
        "--ring",
        type=positive,
        default=1024,
        metavar="N",
        help="messages unsent before a slice ends early; default: 1024",
    )
    parser.add_argument("--exit-with-parent", action="store_true", help="exit when stdin is closed")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: info"
    )
    parser.add_argument("--version", action="version", version=f"scls-worker {__version__}")
    mock = parser.add_argument_group("only with --mock")
    mock.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder whose tokenizer files GetTokenizer sends")
    mock.add_argument("--vocab", type=positive, metavar="N", help=f"default: {MOCK_VOCAB}")
    mock.add_argument("--step-us", type=natural, metavar="US", help="duration of an iteration")
    mock.add_argument("--prefill-us-per-token", type=float, metavar="US", help="duration of a prefilled token")
    return parser


def build(options: argparse.Namespace) -> Served:
    if options.mock:
        return build_mock(options)
    for flag in ("tokenizer", "vocab", "step_us", "prefill_us_per_token"):
        if getattr(options, flag) is not None:
            raise StartupError(f"only with --mock: --{flag.replace('_', '-')}")
    # Before torch is imported: a wrong folder is an answer in no time.
    config = check_folder(options.model)
    try:
        from .model import build_model
    except ImportError as error:
        raise StartupError(
            f"cannot import {error.name}\n  install the extra: pip install 'scls-worker[torch]'"
        ) from None
    return build_model(options, config)


def build_mock(options: argparse.Namespace) -> Served:
    vocab = options.vocab or MOCK_VOCAB
    if vocab <= FIRST_ID:
        raise StartupError(f"--vocab is to be more than {FIRST_ID}: {vocab}")
    if options.tokenizer:
        check_tokenizer(options.tokenizer)
    tokenizer = tokenizer_files(options.tokenizer)
    max_context = options.max_context or MOCK_CONTEXT
    info = worker_info(
        worker_id=options.worker_id,
        served_names=options.served_name or ["mock"],
        # Mocks of one vocabulary draw the same tokens: they are one model.
        model_digest=hashlib.sha256(f"mock {vocab}".encode()).hexdigest(),
        tokenizer_digest=digest(tokenizer),
        vocab_size=vocab,
        eos_token_ids=[EOS_ID],
        max_context=max_context,
        block_size=options.block_size,
        blocks=options.blocks or -(-CONTEXTS_A_POOL * max_context // options.block_size),
        max_rows=options.max_rows,
        chunk_tokens=options.chunk_tokens,
        device="none",
        dtype="none",
        padded=options.layout == "padded",
        engine=f"scls-worker {__version__} mock",
    )
    runner = MockRunner(
        vocab, options.step_us or 0, options.prefill_us_per_token or 0.0, padded=options.layout == "padded"
    )
    if known := runner.cost():
        info.cost_model.CopyFrom(cost.message(known))
    return Served(runner, info, tokenizer)
