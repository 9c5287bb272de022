"""A model folder as a runner: transformers' own modelling code over our KV, through its attention interface.

Runs what the engine planned, one forward pass for all rows, logits only where a token is drawn. Does not know which
rows there are next, nor who asked.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A worker never asks the network for a model, whatever a folder's files name.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from . import __version__, memory, native, varlen
from .attention import Attention, OnesPass, Pass, Span, attend, new_runner, passes
from .config import first_line, kv_shape, longest_context, read_config
from .engine import Burst, Interrupt
from .errors import StartupError
from .folder import eos_token_ids
from .forward import Forward, Unreadable
from .graphs import MOST_OFF, SPARE, Graphs
from .info import digest, model_files, tokenizer_files, worker_info
from .options import Served
from .rectangle import Rectangle
from .rows import Chunk, Drawn, Row, RowKey
from .sampling import Want, draw_tokens
from .varlen import VarlenPass

log = logging.getLogger(__name__)

Packed = Pass | VarlenPass | native.NativePass
Here = Packed | Rectangle

AttentionInterface.register("scls", attend)
AttentionMaskInterface.register("scls", lambda *args, **kwargs: None)

# How the experts of a mixture are computed, pinned because transformers' own choice may change with version and device.
# A token's result depends on the others of its pass by no more than rounding: nothing is dropped, and its experts are
# summed in its own order. ("eager" computes the same, one expert behind the other; "batched_mm" copies an expert's
# weights for every token that chose it.)
EXPERTS = "grouped_mm"

# A worker's first seconds are its calibration's, which a compiler beside it would slow down.
COMPILED_AFTER_S = 10.0


class ModelRunner:
    def __init__(
        self, model: Any, blocks: int, block_size: int, padded: bool = False, eager: bool = False, max_context: int = 0
    ) -> None:
        self.model = model
        self.block_size, self.padded = block_size, padded
        self.device = model.device
        config = model.config.get_text_config()
        cuda = self.device.type == "cuda"
        captures = cuda and not (padded or eager)
        shape = ((blocks + (SPARE if captures else 0)) * block_size, *kv_shape(config))  # [slots, Hkv, D]
        if padded:
            refused: str | None = "padded layout"
        elif cuda:
            refused = self._varlen_refusal(config, max_context)
        else:
            refused = native.refusal(self.device, model.dtype, block_size, shape[-1])
        self.pools = [(self._pool(shape), self._pool(shape)) for _ in range(config.num_hidden_layers)]
        self.native = native.Native(self.pools, block_size) if refused is None and not cuda else None
        self.varlen = refused is None and cuda
        self.number = new_runner()
        name = self.native.name if self.native else "varlen"
        log.info("attention: %s", f"sdpa ({refused})" if refused else name)
        self.forward: Forward | None = None
        if self.native and not eager:
            self.forward = self._read_forward(max_context or longest_context(config, None))
        self.graphs = Graphs(model, self.number, self._lay_ones, spare=blocks) if captures else None
        self.burst: Burst | None = None
        if self.graphs:
            self.burst = self.graphs.burst
        # Where logits are bent before the draw, the draw waits for that.
        elif self.forward and not self.forward.cap:
            self.burst = self._burst

    def _varlen_refusal(self, config: Any, max_context: int) -> str | None:
        heads = (config.num_attention_heads, *kv_shape(config))
        window = getattr(config, "sliding_window", None)
        if window and window >= (max_context or longest_context(config, None)):  # it cuts nothing
            window = None
        capped = bool(getattr(config, "attn_logit_softcapping", None))
        return varlen.refusal(self.device, self.model.dtype, self.block_size, heads, window, capped)

    @torch.inference_mode()
    def _read_forward(self, max_context: int) -> Forward | None:
        """The whole pass as one call, if it computes what the family's own code does; else None."""
        assert self.native
        try:
            forward = Forward(self.model, self.native, max_context)
        except (Unreadable, AttributeError) as reason:  # the family as another transformers has it
            log.info("forward: transformers (%s)", reason)
            return None
        off = forward.disagreement(self._family_logits)
        if not off < MOST_OFF[self.model.dtype]:
            log.warning("forward: transformers (its logits are off by %.2g of their spread)", off)
            return None
        log.info("forward: %s, off by %.1g of the logits' spread", self.native.name, off)
        return forward

    def _pool(self, shape: Sequence[int]) -> Tensor:
        if self.device.type == "cpu":
            return native.zeros(shape, self.model.dtype)
        return torch.zeros(shape, dtype=self.model.dtype, device=self.device)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        if self.graphs and all(chunk.size == 1 and chunk.draws and chunk.row.plain for chunk in chunks):
            return [Drawn(token) for token in self.graphs.burst(chunks, 1)[0]]
        here, ids = self._lay(chunks)
        drawing = [i for i, at in enumerate(here.order) if chunks[at].draws]
        logits = self._logits(ids, here, drawing)  # [N, V]
        if not drawing:
            return []
        drawn = self._draw(logits, [chunks[here.order[i]].row for i in drawing])
        # Back from the pass's order to the engine's.
        placed = {here.order[i]: one for i, one in zip(drawing, drawn, strict=True)}
        return [placed[i] for i in sorted(placed)]

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn]:  # [N, V], N
        """A row draws by the same code in every pass: with a kernel's logarithms or torch's, by what it asks for alone."""
        if self.forward is None:
            return draw_tokens(logits, [Want(row.draw, row.output_len, row.counted()) for row in rows])
        drawn = [Drawn(token) for token in self.forward.draw(logits, rows)]
        if odd := [i for i, row in enumerate(rows) if not row.plain]:
            wants = [Want(rows[i].draw, rows[i].output_len, rows[i].counted()) for i in odd]
            for i, one in zip(odd, draw_tokens(logits[odd], wants), strict=True):
                drawn[i] = one
        return drawn

    @torch.inference_mode()
    def _burst(self, chunks: Sequence[Chunk], most: int, interrupt: Interrupt) -> list[list[int]]:
        here, ids = self._lay(chunks)
        assert self.forward and isinstance(here, native.NativePass)
        return self.forward.burst(ids, here, [chunk.row for chunk in chunks], most, interrupt.at)

    def _lay(self, chunks: Sequence[Chunk]) -> tuple[Here, NDArray[np.uint32]]:
        """The pass, and its token ids in the pass's order."""
        ids = [chunk.row.tokens[chunk.start : chunk.start + chunk.size] for chunk in chunks]
        if self.padded:
            sizes = [chunk.size for chunk in chunks]
            # All rows have as many blocks, but those that ended gave theirs back.
            width = max(len(chunk.row.blocks) for chunk in chunks) * self.block_size
            rectangle = Rectangle([chunk.start for chunk in chunks], sizes, width, self.pools, self.device)
            cells = np.zeros((len(chunks), max(sizes)), dtype=np.uint32)
            for row, its in zip(cells, ids, strict=True):
                row[: len(its)] = its
            return rectangle, cells.reshape(-1)
        spans = [Span(chunk.row.blocks, chunk.start, chunk.size) for chunk in chunks]
        packed = self.lay(spans)
        return packed, np.concatenate([ids[i] for i in packed.order])

    def lay(self, spans: Sequence[Span]) -> Packed:
        if self.native:
            return self.native.lay(spans)
        made = VarlenPass.of_spans if self.varlen else Pass
        return made(spans, self.block_size, self.pools, self.device)

    def _lay_ones(self, positions: Tensor, tables: Tensor) -> Attention:  # [N], [N, W]
        made = VarlenPass.of_ones if self.varlen else OnesPass
        return made(positions, tables, self.block_size, self.pools)

    def _logits(self, ids: NDArray[np.uint32], here: Here, drawing: Sequence[int]) -> Tensor:
        """Of the last tokens of the spans `drawing`."""
        if self.forward is None:
            return self._family_logits(ids, here, drawing)
        assert isinstance(here, native.NativePass)
        return self.forward(ids, here, drawing)

    def _family_logits(self, ids: NDArray[np.uint32], here: Here, drawing: Sequence[int]) -> Tensor:
        """By the family's own forward: what it does behind the output layer (Gemma 2 caps logits softly) is no business of
        ours.
        """
        passes[self.number] = here
        try:
            out = self.model(
                input_ids=torch.from_numpy(ids.astype(np.int64)).to(self.device)[None],
                position_ids=here.positions[None],
                use_cache=False,
                logits_to_keep=here.ends[list(drawing)],
                scls=self.number,
            )
        finally:
            del passes[self.number]
        logits: Tensor = out.logits[0]
        return logits


def build_model(options: argparse.Namespace, config_json: dict[str, Any]) -> Served:
    """Loads a folder that was checked and sizes the pool; raises StartupError where that cannot be done."""
    folder: Path = options.model
    config = read_config(folder)
    max_context = longest_context(config, options.max_context)
    device = pick_device(options.device)
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load(folder, device, dtype)

    def probe(blocks: int) -> ModelRunner:
        return ModelRunner(model, blocks, options.block_size, eager=True, max_context=max_context)

    blocks = options.blocks or memory.default_blocks(model, options, max_context, probe)
    tokenizer = tokenizer_files(folder)
    info = worker_info(
        worker_id=options.worker_id,
        served_names=options.served_name or [folder.resolve().name],
        model_digest=digest(model_files(folder)),
        tokenizer_digest=digest(tokenizer),
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids(folder, config_json),
        max_context=max_context,
        block_size=options.block_size,
        blocks=blocks,
        max_rows=options.max_rows,
        chunk_tokens=options.chunk_tokens,
        device=device,
        dtype=dtype,
        padded=options.layout == "padded",
        engine=f"scls-worker {__version__} torch {torch.__version__} transformers {transformers.__version__}",
    )
    try:
        padded = options.layout == "padded"
        runner = ModelRunner(model, blocks, options.block_size, padded, options.eager, max_context)
    except (RuntimeError, MemoryError) as error:
        raise StartupError(f"no memory for {blocks} KV blocks: {first_line(error)}") from None
    if runner.forward:
        runner.forward.take_over()
    try_out(runner)
    if runner.graphs and options.calibrate:
        runner.graphs.compile_behind().join()  # what is written down is of what will run
    elif runner.graphs:
        runner.graphs.compile_behind(COMPILED_AFTER_S)
    return Served(runner, info, tokenizer)


def load(folder: Path, device: str, dtype: str) -> Any:
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM
    try:
        model, loading = auto.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=getattr(torch, dtype),
            attn_implementation="scls",
            output_loading_info=True,
        )
        # transformers fills in what a file lacks with random numbers.
        missing = [*loading["missing_keys"], *loading["mismatched_keys"]]
        if missing:
            raise StartupError(
                f"weights missing or of another shape: {missing[0]} and {len(missing) - 1} more in {folder}"
            )
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation(EXPERTS)
        return model.to(device).eval()
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(f"cannot load {folder}: {first_line(error)}") from None


def try_out(runner: ModelRunner) -> None:
    """One token through all layers: what the hook does not understand shows here, not in a request."""
    row = Row(RowKey(0, 0, 0), 0, np.zeros(2, dtype=np.uint32), known=1, prompt_len=1, max_tokens=1)
    row.blocks.append(0)
    try:
        runner.run([Chunk(row, 0, 1, draws=True)])
    except Exception as error:
        raise StartupError(f"the model does not run here: {first_line(error)}") from None


def pick_device(wanted: str) -> str:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise StartupError("no CUDA device")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu"
