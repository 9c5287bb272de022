from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Protocol, TypeAlias, final

from scls_router._router import Candidate, View, WorkerLoad

__all__ = ["Decision", "Router", "__version__", "hash_blocks", "main"]

__version__: str

class _Array(Protocol):
    """numpy arrays, torch tensors on the CPU: whatever numpy can take over without converting."""

    def __array__(self) -> object: ...

class _Buffer(Protocol):
    """``array.array``, ``memoryview``: what is indexed like a sequence and has the buffer protocol."""

    def tobytes(self) -> bytes: ...

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
        """Of each candidate; the smallest wins."""

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

    A policy is a name (``product``, ``round_robin``, ``random``, ``least_requests``) or a callable that takes a
    `View` and returns one int of at least 0 for each candidate; the smallest wins. What it raises comes out of
    ``route``, and nothing has changed then. It must not call its own router (RuntimeError), nor wait for a thread
    that does: the router is locked while it runs.

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
            policy: name or callable; ``product`` if None.
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

def main(args: list[str], python: str | None = None) -> int:
    """Runs the command line, the first argument being the program's name. Returns the exit status.

    The same program as the cargo binary, but that workers of ``up`` run in this ``python``.
    """
