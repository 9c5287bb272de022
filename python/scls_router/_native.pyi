from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypeAlias, final

from scls_router import scheduling
from scls_router._router import Candidate, View, WorkerLoad
from scls_router.scheduling import Action, Batch, BatchRecord, Refusal, RowKey, RowTokens, SliceReport

__all__ = [
    "Batcher",
    "CostModel",
    "Decision",
    "Offloader",
    "Router",
    "Scheduler",
    "_Runs",
    "__version__",
    "_simulate",
    "hash_blocks",
    "main",
]

__version__: str

class _Array(Protocol):
    """numpy arrays, torch tensors on the CPU: whatever numpy can take over without converting."""

    def __array__(self) -> object: ...

class _Buffer(Protocol):
    """``array.array``, ``memoryview``: what is indexed like a sequence and has the buffer protocol."""

    def tobytes(self) -> bytes: ...

_Layout: TypeAlias = Literal["paged", "padded"]
_Lengths: TypeAlias = Iterable[int] | _Array
_Ids: TypeAlias = Sequence[int] | bytes | _Array | _Buffer

def hash_blocks(hash_root: int, ids: _Ids, block_size: int) -> list[int]:
    """Hashes of the whole blocks of ``ids``, each chained with the one before.

    ``h[i] = xxh3_64(block i as little-endian u32, seed=h[i-1])`` with ``h[-1] = hash_root``: a hash names the whole
    prefix that ends with its block. A partial last block has none.

    >>> hash_blocks(0, [0] * 20, 16)
    [3457472693978015086]
    >>> hash_blocks(0, [0] * 32, 16) == hash_blocks(0, [0] * 16, 16) + hash_blocks(3457472693978015086, [0] * 16, 16)
    True

    Args:
        hash_root: u64 that keeps apart what must never share KV (fleet, model, adapter, tenant).
        ids: token ids, shape ``[tokens]``: ints; a buffer of 4- or 8-byte integers (numpy, torch on the CPU,
            ``array``), read as a whole without making an object of each id; or bytes, four each, little-endian.
        block_size: tokens a block.

    Returns:
        ``len(ids) // block_size`` u64 hashes.

    Raises:
        ValueError: ``block_size`` is 0, an id is not in 0 to 2**32 - 1 (its index is named), bytes are not whole ids,
            or there is more than one dimension.
        TypeError: these are no ids.
        OverflowError: ``hash_root`` or ``block_size`` is out of range.
    """

@final
class CostModel:
    """How long an iteration takes on a worker, as a function of what is in it: linear, no coefficient below zero, so that
    more work never takes less time. Immutable, comparable, picklable. All times are seconds.

    Two layouts. A *paged* worker computes what is there: rows that decode, the tokens they see, prefill tokens, and the
    pairs of these with the tokens they attend.

    >>> paged = CostModel.paged(
    ...     prefill_constant=0.0, prefill_per_token=1e-4, prefill_per_pair=0.0,
    ...     step_constant=1e-2, step_per_row=1e-4, step_per_context=1e-6,
    ... )
    >>> round(paged.iteration(rows=10, context=5000), 6)  # ten rows decode
    0.016
    >>> round(paged.iteration(rows=10, context=5000, prefill=200), 6)  # and a prompt's tokens ride along
    0.036

    A *padded* worker computes a rectangle of ``rows`` rows, each as long as the longest (arXiv 2406.13511).

    >>> padded = CostModel.padded(prefill=(1e-2, 0.0, 0.0, 1e-4), step=(1e-2, 1e-4, 0.0, 1e-6))
    >>> round(padded.slice(rows=4, longest=100, steps=1), 6)  # the prompt's pass, which draws the first tokens
    0.05
    """

    def __new__(cls, form: Mapping[str, object]) -> CostModel:
        """A model put together again.

        Args:
            form: what ``to_dict`` gives.

        Raises:
            CostError: a coefficient is missing, negative or not finite; the message names it.
            ValueError: there is no such shape.
            TypeError: a coefficient is no number.
        """

    @staticmethod
    def paged(
        *,
        prefill_constant: float,
        prefill_per_token: float,
        prefill_per_pair: float,
        step_constant: float,
        step_per_row: float,
        step_per_context: float,
    ) -> CostModel:
        """The model of a paged worker, each coefficient in seconds.

        Args:
            prefill_constant: any prefill in an iteration.
            prefill_per_token: each prefilled token.
            prefill_per_pair: each pair of a prefilled token and one it attends.
            step_constant: an iteration.
            step_per_row: each row that decodes.
            step_per_context: each token that a decoding row sees.

        Raises:
            CostError: a coefficient is negative or not finite; the message names it.
        """

    @staticmethod
    def padded(*, prefill: Sequence[float], step: Sequence[float]) -> CostModel:
        """The model of a padded worker: ``constant + per_row*N + per_position*L + per_cell*N*L`` seconds for a pass over
        ``N`` rows padded to length ``L``.

        Args:
            prefill: ``(constant, per_row, per_position, per_cell)`` of the pass over the prompts.
            step: the same of a decode step.

        Raises:
            CostError: a coefficient is negative or not finite; the message names it.
            ValueError: these are not four.
        """

    @staticmethod
    def fit(samples: Sequence[Mapping[str, float]], layout: _Layout = "paged") -> CostModel:
        """The model that meets measured iterations best: least squares of relative errors, no coefficient below zero.

        >>> truth = CostModel.padded(prefill=(0.01, 0.0, 0.0, 1e-4), step=(0.01, 1e-4, 0.0, 1e-6))
        >>> shapes = [(rows, longest) for rows in (1, 4, 16) for longest in (64, 256, 1024)]
        >>> grid = [dict(rows=n, longest=l, prefill=n * l * fills) for n, l in shapes for fills in (0, 1)]
        >>> model = CostModel.fit([dict(it, seconds=truth.iteration(**it)) for it in grid], layout="padded")
        >>> model.p99_error < 1e-6, round(model.to_dict()["step"]["per_cell"], 9)
        (True, 1e-06)

        Args:
            samples: dicts with the arguments of ``iteration``, 0 where missing, and the ``seconds`` it took.
            layout: ``paged`` or ``padded``.

        Raises:
            FitError: too few samples, or a time that is none.
            ValueError: a sample has no ``seconds``, or a key that is none; or there is no such layout.
            OverflowError: a count is negative.
        """

    @staticmethod
    def from_json(text: str | bytes | bytearray) -> CostModel:
        """A model from JSON: that of ``to_json``, or the whole file of a calibration.

        Raises:
            CostError: a coefficient is missing, negative or not finite; the message names it.
            ValueError: this is no JSON, or there is no such layout.
        """

    def to_json(self) -> str:
        """As JSON, with ``layout`` for ``shape``: as the router and calibrations have it."""

    def to_dict(self) -> dict[str, Any]:
        """``shape``, the coefficients of ``prefill`` and ``step``, and of a fit ``r2``, ``mean_error`` and ``p99_error``.

        >>> model = CostModel.padded(prefill=(0.01, 0.0, 0.0, 1e-4), step=(0.01, 1e-4, 0.0, 1e-6))
        >>> model.to_dict()["step"]
        {'constant': 0.01, 'per_row': 0.0001, 'per_position': 0.0, 'per_cell': 1e-06}
        >>> CostModel(model.to_dict()) == CostModel.from_json(model.to_json()) == model
        True
        """

    @property
    def layout(self) -> _Layout:
        """``paged`` or ``padded``."""

    def iteration(self, rows: int = 0, context: int = 0, longest: int = 0, prefill: int = 0, pairs: int = 0) -> float:
        """Seconds of one iteration.

        Args:
            rows: rows that decode; padded: all rows, in the pass over the prompts too.
            context: tokens that the decoding rows see, summed.
            longest: length of the longest row, which padded workers pay for.
            prefill: prefill tokens; padded: anything but 0 makes this the pass over the prompts.
            pairs: pairs of a prefilled token and one it attends.

        Raises:
            OverflowError: a number is negative.
        """

    def slice(self, rows: int, longest: int = 0, context: int = 0, uncached: int = 0, steps: int = 1) -> float:
        """Seconds of a batch over ``steps`` iterations if no row ends; the first draws each row's first token. O(1).

        Args:
            rows: rows of the batch.
            longest: tokens of the longest; only padded workers pay for it.
            context: tokens of all rows; only paged workers pay for it.
            uncached: of these, tokens that want prefill.
            steps: iterations.

        Raises:
            OverflowError: a number is negative.
        """

    @property
    def r2(self) -> float | None:
        """Coefficient of determination of the fit; None of a model that was not fitted."""

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of the fit over its samples."""

    @property
    def p99_error(self) -> float | None:
        """The relative error that 99 % of the fit's samples stay below."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[type[CostModel], tuple[object, ...]]: ...

@final
class Batcher:
    """Cuts waiting rows into batches, so that all of them together take the least time.

    A padded batch costs as if all its rows were as long as its longest, so rows of like length belong together; but a
    pass has a price of its own, so they should not be too few. Over rows sorted by length the best cut is found exactly, in
    O(n * max_rows) (arXiv 2406.13511). For a paged worker it packs.

    >>> model = CostModel.padded(prefill=(3e-3, 0.0, 0.0, 1e-4), step=(3e-3, 5e-5, 0.0, 1e-6))
    >>> batcher = Batcher(model, capacity_tokens=16_000, max_rows=8, slice_len=32)
    >>> for batch in batcher.split([900, 20, 1000, 30]):
    ...     print(batch.rows, batch.longest, round(batch.seconds, 2))
    (1, 3) 30 0.11
    (0, 2) 1000 0.36
    """

    def __new__(
        cls, cost_model: CostModel, capacity_tokens: int, max_rows: int, slice_len: int, *, block_size: int = 1
    ) -> Batcher:
        """For workers of one kind.

        Args:
            cost_model: times of batches; its layout says how memory is counted.
            capacity_tokens: tokens whose KV a worker can hold.
            max_rows: most rows of a batch.
            slice_len: S, the most iterations of a batch.
            block_size: tokens a KV block: memory is counted in whole blocks.

        Raises:
            ValueError: a size is 0.
        """

    def split(self, lengths: _Lengths) -> list[Batch]:
        """The cheapest batches, shortest rows first; of equally cheap ones the fewest.

        Args:
            lengths: tokens of each row: ints, or an array of integers, shape ``[rows]``.

        Returns:
            `scheduling.Batch`es: each row is in one of them.

        Raises:
            RowTooLong: a row fits no batch, not even alone; the message names it.
            OverflowError: a length is negative.
        """

    def in_order(self, lengths: _Lengths, most: int) -> list[Batch]:
        """Rows as they come, at most ``most`` to a batch and never more than fit: what ``split`` is compared with.

        Raises:
            RowTooLong: a row fits no batch, not even alone; the message names it.
            OverflowError: a length is negative.
        """

    def by_length(self, lengths: _Lengths, most: int) -> list[Batch]:
        """Rows by length, at most ``most`` to a batch and never more than fit.

        Raises:
            RowTooLong: a row fits no batch, not even alone; the message names it.
            OverflowError: a length is negative.
        """

@final
class Offloader:
    """Gives batches to workers: the longest first, each to the worker that has least to do (arXiv 2406.13511). From equal
    loads the last worker is done within ``4/3 - 1/(3m)`` of the best that is possible on ``m`` workers (Graham 1969).

    >>> offloader = Offloader(2)
    >>> offloader.assign([2.0, 3.0, 2.0, 3.0])
    [0, 0, 1, 1]
    >>> offloader.loads
    [5.0, 5.0]
    >>> offloader.done(0, 2.0)
    >>> offloader.loads
    [3.0, 5.0]
    """

    def __new__(cls, workers: int) -> Offloader:
        """Workers with nothing to do.

        Args:
            workers: how many there are.

        Raises:
            ValueError: there is none.
        """

    def assign(self, seconds: Sequence[float]) -> list[int]:
        """A worker for each batch, whose time counts there from now on. Ties rotate.

        Args:
            seconds: of each batch.

        Returns:
            Indices of workers, one for each batch.

        Raises:
            ValueError: a time is negative or not finite.
        """

    def done(self, worker: int, seconds: float) -> None:
        """A batch is done or given up: exactly what ``assign`` counted is taken back, not what it took.

        Args:
            worker: its index.
            seconds: as they were assigned.

        Raises:
            IndexError: there is no such worker.
            ValueError: the time is negative or not finite.
        """

    @property
    def loads(self) -> list[float]:
        """Seconds that each worker has to do."""

@final
class Decision:
    """Where a prompt goes, with all that was known when it was decided. Immutable, comparable, picklable.

    Made by `Router.route` and `Router.route_many`.
    """

    def __new__(
        cls,
        id: int | None,
        policy: str,
        seed: int,
        turn: int,
        tokens: int,
        worker: str,
        candidates: Sequence[tuple[str, int, int, int]],
        scores: Sequence[int],
        anticipation: tuple[float, float] = ...,
        filtered: Sequence[str] = ...,
    ) -> Decision:
        """A record put together again, as a pickle does.

        Raises:
            ValueError: the worker is not a candidate, or there is not one score for each.
        """

    @property
    def id(self) -> int | None:
        """Its name in this router; None if it was asked for with ``commit=False``."""

    @property
    def policy(self) -> str:
        """Name of the policy; ``callable:NAME`` for one written in Python."""

    @property
    def seed(self) -> int:
        """The router's seed, which ``random`` draws from."""

    @property
    def turn(self) -> int:
        """Decisions made before this one: where ties begin to be broken."""

    @property
    def tokens(self) -> int:
        """Of the prompt."""

    @property
    def anticipation(self) -> tuple[float, float]:
        """What ``product_anticipating`` expects: arrivals a second at each worker, and seconds of prefill a token."""

    @property
    def filtered(self) -> list[str]:
        """Workers that the hotspot guard kept it from, whatever their scores: they hold a prefix that too many prompts begin with."""

    @property
    def worker(self) -> str:
        """Who gets it."""

    @property
    def new_tokens(self) -> int:
        """Tokens of the prompt that the worker has to compute, at least 1."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the worker is believed to hold, or to hold soon."""

    @property
    def queued_tokens(self) -> int:
        """New tokens on their way to the worker before this decision."""

    @property
    def batch_size(self) -> int:
        """Decisions for the worker that had not ended before this one."""

    @property
    def score(self) -> int:
        """The winner's."""

    @property
    def scores(self) -> list[int]:
        """Of each candidate; the smallest of those that are not ``filtered`` wins."""

    @property
    def candidates(self) -> list[Candidate]:
        """All workers as they were, in the order of ``scores``."""

    def recompute(self) -> str:
        """The worker, chosen again from this record alone (for a policy written in Python: from its scores).

        >>> Decision(None, "product", 0, 0, 32, "b", [("a", 32, 0, 1), ("b", 32, 0, 0)], [64, 32]).recompute()
        'b'
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[type[Decision], tuple[object, ...]]: ...

@final
class Router:
    """The router in your own process, in front of engines of your own.

    A decision counts at once: the worker's batch is one larger, its new tokens are queued, and the prompt's blocks are
    taken to be there, so that a follow-up finds them before the first prefill ends. Tell the router how it went on,
    with ``prefilled`` at the first token and ``finished`` at the end; ``take_back`` if the engine never ran it.

    >>> router = Router()
    >>> router.add_worker("a", blocks=10_000)
    >>> router.add_worker("b", blocks=10_000)
    >>> turn = list(range(100))
    >>> first = router.route(turn)
    >>> first.worker, first.new_tokens
    ('a', 100)
    >>> router.prefilled(first)
    True
    >>> router.finished(first, output=[7, 8, 9])
    True
    >>> second = router.route(turn + [7, 8, 9] + list(range(200, 220)))
    >>> second.worker, second.cached_tokens, second.new_tokens
    ('a', 96, 27)
    >>> router.workers()[0]
    WorkerLoad(name='a', queued_tokens=27, batch_size=1, indexed_blocks=7, blocks=10000)

    What an engine holds is known in one of two ways. One with KV events reports blocks by the hashes of ``hash_blocks``:

    >>> router.add_worker("c")
    >>> router.report("c", stored=router.hash_blocks(range(48)))
    >>> router.route(range(64), commit=False).candidates[2].new_tokens
    16

    One without is added with its capacity in ``blocks``: it is taken to hold what was used there last.

    A policy is a name (``product``, ``product_anticipating``, ``round_robin``, ``random``, ``least_requests``) or a
    callable that takes a `View` and returns one int of at least 0 for each candidate; the smallest wins. What it raises
    comes out of ``route``, and nothing has changed then. It must not call its own router (RuntimeError), nor wait for a thread
    that does: the router is locked while it runs.

    Where many of the latest prompts begin with a prefix that few workers hold, and all of them would go there, a guard
    keeps some of them off until enough workers hold it; ``Decision.filtered`` says so. ``docs/hotspot.md`` has the why.

    >>> longest_queue_last = Router(lambda view: [c.queued_tokens for c in view.candidates])

    All methods may be called from any thread; the heavy part runs with the interpreter released.
    """

    def __new__(
        cls,
        policy: str | Callable[[View], Iterable[int]] | None = None,
        *,
        block_size: int = 16,
        hash_root: int = 0,
        tokenizer: str | PathLike[str] | None = None,
        seed: int = 0,
    ) -> Router:
        """A router without workers.

        Args:
            policy: name or callable; ``product_anticipating`` if None.
            block_size: tokens a KV block, as in the engines.
            hash_root: u64 at the start of every chain of block hashes.
            tokenizer: a ``tokenizer.json`` or the directory it is in, for prompts given as text.
            seed: for ``random``.

        Raises:
            UnknownPolicy: no policy of this name.
            ValueError: ``block_size`` is 0, or the tokenizer's file is none.
            OSError: the tokenizer's file cannot be read.
            TypeError: ``policy`` is neither a name nor callable.
        """

    def add_worker(self, name: str, *, blocks: int | None = None) -> None:
        """A worker that holds nothing yet.

        Args:
            name: yours, as decisions will have it.
            blocks: KV blocks of an engine that does not report: what it holds is predicted, least recently used blocks
                given up first. None for an engine whose blocks you will ``report``.

        Raises:
            WorkerExists: there is one of this name.
        """

    def remove(self, name: str) -> None:
        """Forgets a worker, its blocks and the decisions for it, which have then ended.

        Raises:
            UnknownWorker: there is none of this name.
        """

    def route(self, prompt: str | _Ids, *, commit: bool = True) -> Decision:
        """Chooses a worker.

        Args:
            prompt: token ids, as `hash_blocks` takes them, or a text if there is a tokenizer (special tokens added).
            commit: False only asks: nothing changes, and the decision has no ``id``.

        Raises:
            NoWorker: there is none.
            ValueError: no tokens, ids out of range, a text without a tokenizer, or scores that are negative or not one
                for each candidate.
            TypeError: this is no prompt, or a score is not an int.
        """

    def route_many(self, prompts: Iterable[str | _Ids], *, commit: bool = True) -> list[Decision]:
        """As ``route`` for one after another, in one call: each decision counts before the next is made.

        If one fails none was made. An array of shape ``[prompts, tokens]`` is as many prompts.
        """

    def prefilled(self, decision: Decision) -> bool:
        """Its prompt is computed: the engine gave a first token. ``finished`` implies it.

        Returns:
            False if the decision has ended (or its worker was removed) or was prefilled before; nothing changes then.

        Raises:
            ValueError: the decision was made with ``commit=False``.
        """

    def finished(self, decision: Decision, output: _Ids | None = None) -> bool:
        """It ran and ended, however it ended: what the decision counted is taken back.

        Args:
            decision: what ``route`` returned.
            output: ids the engine generated. Where what a worker holds is predicted, the blocks they complete are
                predicted too, but for the last id, whose KV no engine computes.

        Returns:
            False if it had ended before (or its worker was removed), so that it is safe in a ``finally``.

        Raises:
            ValueError: the decision was made with ``commit=False``, or ids are out of range.
        """

    def take_back(self, decision: Decision) -> bool:
        """It never ran: as if it had not been made. If its prompt was prefilled, those blocks stay.

        Returns:
            False if it had ended before.

        Raises:
            ValueError: the decision was made with ``commit=False``.
        """

    def report(
        self,
        worker: str,
        *,
        stored: Iterable[int] | None = None,
        removed: Iterable[int] | None = None,
        cleared: bool = False,
    ) -> None:
        """What the engine says of its KV cache. Committed blocks count beside it until their decisions end.

        Engines name blocks by hashes of their own (vLLM's and SGLang's events bring the ids along): keep which is which.

        >>> router, ours = Router(), {}
        >>> router.add_worker("a")
        >>> def block_stored(parent, blocks, token_ids):
        ...     hashes = hash_blocks(ours.get(parent, router.hash_root), token_ids, router.block_size)
        ...     ours.update(zip(blocks, hashes))
        ...     router.report("a", stored=hashes)
        >>> def block_removed(blocks):
        ...     router.report("a", removed=[ours.pop(block) for block in blocks])
        >>> block_stored(None, ["x", "y"], list(range(32)))
        >>> block_stored("y", ["z"], list(range(32, 48)))
        >>> router.route(range(64), commit=False).cached_tokens
        48
        >>> block_removed(["z"])
        >>> router.route(range(64), commit=False).cached_tokens
        32

        Args:
            worker: one added without ``blocks``.
            stored: hashes of blocks that are there now (see ``hash_blocks``), applied last.
            removed: hashes of blocks that are there no more, applied before.
            cleared: all that was stored is gone, applied first.

        Raises:
            UnknownWorker: there is none of this name.
            ValueError: what this worker holds is predicted.
            OverflowError: a hash is no u64.
        """

    def hash_blocks(self, prompt: str | _Ids) -> list[int]:
        """Hashes of the prompt's whole blocks with this router's root and block size, shape ``[tokens // block_size]``."""

    def workers(self) -> list[WorkerLoad]:
        """What is believed of each worker, in the order of candidates."""

    @property
    def policy(self) -> str:
        """As decisions have it."""

    @property
    def block_size(self) -> int:
        """Tokens a block."""

    @property
    def hash_root(self) -> int:
        """The root of all chains."""

@final
class Scheduler:
    """The scheduler in your own process, in front of workers of your own: what runs together, where, and for how long.

    A state machine without threads, sockets or a clock. You tell it what happened and when, and carry out the actions
    it returns, in order: plans go to workers, tokens to clients. ``docs/scheduler.md`` has a worker in forty lines.

    >>> from scls_router import scheduling
    >>> scheduler = Scheduler(slice_len=32)
    >>> scheduler.join("a", blocks=100, max_rows=8, max_context=1000, now=0.0)
    []
    >>> scheduler.snapshot("a", [], now=0.0)  # nothing is cached there
    []
    >>> for action in scheduler.arrive(1, [5, 6, 7], max_tokens=2, now=0.0):
    ...     match action:
    ...         case scheduling.Placed(row, worker):
    ...             print(row, worker)
    ...         case scheduling.Plan(worker, no, base) if base == 0:
    ...             batch, key = no, action.add[0].key
    ...             print(worker, batch, action.add[0].prompt, action.steps)
    RowId(request=1, choice=0) a
    a 1 (5, 6, 7) 32

    The worker starts it, computes the prompt and draws a token, then another, which is the row's last:

    >>> scheduler.steps("a", batch, [scheduling.RowTokens(key, 0, (8,))], now=0.1)
    [Tokens(row=RowId(request=1, choice=0), first_index=0, ids=(8,))]
    >>> *_, end = scheduler.steps("a", batch, [scheduling.RowTokens(key, 1, (9,), finish="length")], now=0.2)
    >>> end.reason, end.prompt, end.emitted, end.slices, end.worker
    ('length', 3, 2, 1, 'a')
    >>> report = scheduling.RowReport(key, computed=4, emitted=2, finish="length", held=False)
    >>> done = scheduling.SliceReport(batch, "all_done", steps=2, rows=(report,), prefill=0.1, decode=0.1, peak=1)
    >>> scheduler.slice_reported("a", done, now=0.2)
    []
    >>> scheduler.workers()[0].batch_size, scheduler.rows
    (0, 0)

    Every call takes ``now``: seconds on a clock of yours that does not go back, such as ``time.monotonic()``. Methods may
    be called from any thread; what a caller should see in order it calls in order.
    """

    def __new__(
        cls,
        policy: str = "product_anticipating",
        scheduler: str = "slice",
        *,
        block_size: int = 16,
        hash_root: int = 0,
        vocab: int = 4294967295,
        slice_len: int | None = None,
        seed: int = 0,
        max_rows: int = 4096,
    ) -> Scheduler:
        """A scheduler without workers.

        Args:
            policy: where arrivals go: ``product``, ``product_anticipating``, ``product_time`` (the product in seconds),
                ``round_robin``, ``random`` or ``least_requests``.
            scheduler: how rows become batches: ``slice``, or ``scls``, ``sls``, ``ils`` to compare with.
            block_size: tokens a KV block, as in the workers.
            hash_root: u64 at the start of every chain of block hashes.
            vocab: ids below this one exist; a worker that draws another is quarantined.
            slice_len: S, the most iterations of a slice, where it is to be fixed; None: measured.
            seed: for the policy ``random``.
            max_rows: most rows unfinished at once; more are rejected.

        Raises:
            UnknownPolicy: no policy of this name.
            UnknownScheduler: no scheduler of this name.
            ValueError: ``block_size`` or ``slice_len`` is 0.
        """

    def join(
        self,
        name: str,
        *,
        blocks: int,
        max_rows: int,
        max_context: int,
        now: float,
        chunk_tokens: int = 512,
        layout: _Layout | None = None,
        cost_model: CostModel | None = None,
    ) -> list[Action]:
        """A worker is there. It takes rows once its ``snapshot`` is complete.

        Args:
            name: yours, as actions will have it.
            blocks: its KV blocks.
            max_rows: most rows of a batch.
            max_context: most tokens of a row, prompt and output together.
            chunk_tokens: most prefill tokens of an iteration.
            layout: ``paged`` or ``padded``; by default that of the cost model, or ``paged``.
            cost_model: what its iterations take, where it was measured; else it is learnt from reports.
            now: seconds.

        Raises:
            WorkerExists: there is one of this name.
            ValueError: a size is 0, or layout and cost model are of two forms.
        """

    def lost(self, worker: str, *, now: float) -> list[Action]:
        """A worker is gone: its rows go on elsewhere from the tokens they have.

        Raises:
            UnknownWorker: there is none of this name.
        """

    def drain(self, worker: str, *, now: float) -> list[Action]:
        """No new rows for a worker: those it knows finish there, the others go elsewhere.

        Raises:
            UnknownWorker: there is none of this name.
        """

    def snapshot(self, worker: str, hashes: Iterable[int], *, now: float, last: bool = True) -> list[Action]:
        """The blocks that a worker has cached, in one or several parts; the first forgets what was believed before.

        Args:
            worker: whose.
            hashes: of whole blocks, as ``hash_blocks`` names them.
            last: False if more is to come.
            now: seconds.

        Raises:
            UnknownWorker: there is none of this name.
            OverflowError: a hash is no u64.
        """

    def kv_delta(
        self,
        worker: str,
        *,
        now: float,
        removed: Iterable[int] | None = None,
        stored: Iterable[int] | None = None,
    ) -> list[Action]:
        """Blocks that a worker has cached no more, and those that came.

        Args:
            worker: whose.
            removed: hashes, applied first.
            stored: hashes.
            now: seconds.

        Raises:
            UnknownWorker: there is none of this name.
            OverflowError: a hash is no u64.
        """

    def arrive(
        self,
        request_id: int,
        prompt: _Ids,
        *,
        max_tokens: int,
        now: float,
        n: int = 1,
        urgent: bool = False,
    ) -> list[Action]:
        """A request.

        Args:
            request_id: its id: no request that has not ended has it.
            prompt: token ids, as `hash_blocks` takes them.
            max_tokens: most output tokens of a row.
            n: rows.
            urgent: a short time to the first token is promised: a running slice is cut for it at once.
            now: seconds.

        Raises:
            RequestExists: a request of this id has not ended.
            ValueError: ids are out of range.
            TypeError: this is no prompt.
        """

    def cancel(self, request_id: int, *, now: float, choice: int | None = None) -> list[Action]:
        """The client went away, or its text is complete: rows of the request end now. Of one that has ended nothing changes.

        Args:
            request_id: which.
            choice: one row of it; None for all.
            now: seconds.
        """

    def steps(self, worker: str, batch: int, rows: Sequence[RowTokens], *, now: float) -> list[Action]:
        """What an iteration of a worker drew, or some that followed one another: then rows have several ids.

        Args:
            worker: who.
            batch: number of the plan that formed the running batch.
            rows: a `scheduling.RowTokens` for each row that drew or ended.
            now: seconds.

        Raises:
            UnknownWorker: there is none of this name.
            ValueError: there is no such finish reason, or an id is out of range.
        """

    def slice_reported(self, worker: str, report: SliceReport, *, now: float) -> list[Action]:
        """A batch ended.

        Args:
            worker: whose.
            report: how it went, and the plan that starts now.
            now: seconds.

        Raises:
            UnknownWorker: there is none of this name.
            ValueError: there is no such end or finish reason, or a time is negative or not finite.
        """

    def refused(
        self,
        worker: str,
        plan: int,
        reason: Refusal,
        *,
        now: float,
        rows: Sequence[RowKey] | None = None,
        detail: str = "",
    ) -> list[Action]:
        """A worker ran nothing of a plan.

        Args:
            worker: who.
            plan: number of the plan.
            reason: ``stale`` (its base had ended), ``no_memory``, ``too_many_rows``, ``unknown_row`` or ``unsupported``.
            rows: keys of the rows at fault, if any are.
            detail: for people.
            now: seconds.

        Raises:
            UnknownWorker: there is none of this name.
            ValueError: there is no such reason.
        """

    def tick(self, *, now: float) -> list[Action]:
        """Time has passed; answers a `scheduling.WakeAt`."""

    def route(self, prompt: _Ids, *, now: float) -> scheduling.Decision:
        """Where a prompt would go now, and why. Commits nothing.

        Raises:
            NoWorker: none is ready that could hold it.
            ValueError: ids are out of range.
        """

    def workers(self) -> list[scheduling.WorkerLoad]:
        """What is believed of each worker, in order of joining (a place that became free is taken again)."""

    def decisions(self) -> list[scheduling.Decision]:
        """The latest decisions, oldest first."""

    def batches(self) -> list[BatchRecord]:
        """The latest batches, oldest first: time and memory as foreseen, and what happened."""

    @property
    def slice_len(self) -> int:
        """S: most iterations of the next slice."""

    @property
    def rows(self) -> int:
        """Rows that have not ended."""

def main(args: list[str], python: str | None = None) -> int:
    """Runs the command line, the first argument being the program's name. Returns the exit status.

    The same program as the cargo binary, but that workers of ``up`` run in this ``python``.
    """

@final
class _Runs:
    @property
    def json(self) -> str: ...
    @property
    def table(self) -> str: ...
    @property
    def page(self) -> str: ...
    def columns(self, run: int) -> dict[str, tuple[str, bytes]]: ...

def _simulate(flags: Sequence[str]) -> _Runs: ...
