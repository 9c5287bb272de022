"""When a failed call is tried again. Knows errors and time, not gRPC.

As gRPC's own retries do it (proposal A6): backoff with jitter, the server's push-back honoured, and a bucket of tokens
a client's calls share, so that retries stay a small part of the load on a router that is in trouble.
"""

from __future__ import annotations

import math
import random
import threading
import time
from dataclasses import dataclass

from scls_router.errors import SclsError

ENDLESS = 1e9  # seconds
RETRIED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a client tries again what failed as unavailable or overloaded before its first token came.

    Every failure takes one token out of the client's bucket, every success puts `refill` back; there are retries only
    while it is more than half full.

    Attributes:
        attempts: most calls for one request, the first included; 1 never retries.
        backoff: longest pause before the second call, in seconds; it doubles with each. The pause is drawn evenly
            from 0 to that, and what the router asked for comes on top.
        most_backoff: what it doubles up to, in seconds.
        bucket: tokens in a full bucket; `math.inf` for retries without a budget.
        refill: tokens that a success puts back.
    """

    attempts: int = 4
    backoff: float = 0.1
    most_backoff: float = 5.0
    bucket: float = 10.0
    refill: float = 0.1


class Budget:
    """The bucket of one client; its calls may run in many threads."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        # Not what is left: half of an endless bucket is no less than all of it.
        self._spent = 0.0
        self._lock = threading.Lock()

    def failed(self) -> bool:
        """Counts a failure. Whether there may be a retry."""
        with self._lock:
            self._spent = min(self._policy.bucket, self._spent + 1)
            return self._spent < self._policy.bucket / 2

    def succeeded(self) -> None:
        """Counts a success."""
        with self._lock:
            self._spent = max(0.0, self._spent - self._policy.refill)


class Attempts:
    """The calls made for one request, within one deadline."""

    def __init__(self, policy: RetryPolicy, budget: Budget, timeout: float) -> None:
        """`timeout` in seconds, infinite for none."""
        if math.isnan(timeout) or timeout <= 0:
            raise ValueError(f"timeout must be more than 0 seconds: {timeout}")
        self._policy = policy
        self._budget = budget
        # What gRPC cannot count to is for ever.
        self._deadline = time.monotonic() + timeout if timeout < ENDLESS else math.inf
        self._made = 0

    def left(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if math.isinf(self._deadline) else max(0.0, self._deadline - time.monotonic())

    def succeeded(self) -> None:
        """The call that was made last went well."""
        self._budget.succeeded()

    def pause(self, error: SclsError) -> float:
        """Seconds to wait before the next call, after the last failed with `error`. Raises it if there is none."""
        self._made += 1
        if error.status not in RETRIED:
            raise error
        allowed = self._budget.failed()
        if not allowed or self._made >= self._policy.attempts:
            raise error
        doubled = self._policy.backoff * 2.0 ** min(self._made - 1, 60)
        ceiling = min(self._policy.most_backoff, doubled)
        pause = (error.retry_after or 0.0) + random.uniform(0, ceiling)
        left = self.left()
        if left is not None and pause >= left:
            # Waiting would only end in a deadline and hide what was wrong.
            raise error
        return pause
