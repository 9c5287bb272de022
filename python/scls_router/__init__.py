"""Product routing and slice-level scheduling of LLM inference: the Rust core from Python."""

from scls_router._native import Decision, Router, __version__, hash_blocks
from scls_router._router import Candidate, NoWorker, UnknownPolicy, UnknownWorker, View, WorkerExists, WorkerLoad

# Records and errors are shown, documented and pickled by the name under which they are imported.
for _public in (Candidate, NoWorker, UnknownPolicy, UnknownWorker, View, WorkerExists, WorkerLoad):
    _public.__module__ = __name__
del _public

__all__ = [
    "Candidate",
    "Decision",
    "NoWorker",
    "Router",
    "UnknownPolicy",
    "UnknownWorker",
    "View",
    "WorkerExists",
    "WorkerLoad",
    "__version__",
    "hash_blocks",
]
