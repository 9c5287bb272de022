"""Product routing and slice-level scheduling of LLM inference: the Rust core from Python, and clients of a router."""

from importlib import import_module
from typing import TYPE_CHECKING

from scls_router._native import (
    Batcher,
    CostModel,
    Decision,
    Offloader,
    Router,
    Scheduler,
    __version__,
    hash_blocks,
)
from scls_router._router import (
    Candidate,
    CostError,
    FitError,
    NoWorker,
    RequestExists,
    RowTooLong,
    UnknownPolicy,
    UnknownScheduler,
    UnknownWorker,
    View,
    WorkerExists,
    WorkerLoad,
)

if TYPE_CHECKING:
    from scls_router._retry import RetryPolicy
    from scls_router.aio import AsyncClient
    from scls_router.client import Client
    from scls_router.errors import SclsError
    from scls_router.simulation import Simulation, simulate

# Records and errors are shown, documented and pickled by the name under which they are imported.
for _public in (
    Candidate,
    CostError,
    FitError,
    NoWorker,
    RequestExists,
    RowTooLong,
    UnknownPolicy,
    UnknownScheduler,
    UnknownWorker,
    View,
    WorkerExists,
    WorkerLoad,
):
    _public.__module__ = __name__
del _public

__all__ = [
    "AsyncClient",
    "Batcher",
    "Candidate",
    "Client",
    "CostError",
    "CostModel",
    "Decision",
    "FitError",
    "NoWorker",
    "Offloader",
    "RequestExists",
    "RetryPolicy",
    "Router",
    "RowTooLong",
    "Scheduler",
    "SclsError",
    "Simulation",
    "UnknownPolicy",
    "UnknownScheduler",
    "UnknownWorker",
    "View",
    "WorkerExists",
    "WorkerLoad",
    "__version__",
    "hash_blocks",
    "simulate",
]

# Loaded when first asked for: gRPC and protobuf take longer than all the rest, and few simulate.
_LATER = {
    "AsyncClient": "scls_router.aio",
    "Client": "scls_router.client",
    "RetryPolicy": "scls_router._retry",
    "SclsError": "scls_router.errors",
    "Simulation": "scls_router.simulation",
    "simulate": "scls_router.simulation",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in ("errors", "results", "scheduling", "simulation"):
        return import_module(f"scls_router.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
