"""The wheel's `scls-router`: the same program as the cargo binary."""

import signal
import sys

from scls_router._native import main as _main


def main() -> None:
    # Rust handles the signals from here; Python's own SIGINT handler would never get to run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # None where an embedding program does not say which interpreter it is.
    sys.exit(_main(["scls-router", *sys.argv[1:]], sys.executable or None))
