"""The `scls-worker` command: options, signals, one line on stdout when it serves. Decides nothing."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from .errors import StartupError

# After the router's end, a worker whose engine hangs is not to stay behind.
ORPHAN_GRACE_S = 30.0


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(arguments)
    except StartupError as error:
        print(f"scls-worker: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: Sequence[str] | None) -> None:
    try:
        from .options import Served, build, parser
    except ImportError as error:
        raise StartupError(f"cannot import {error.name}\n  reinstall: pip install scls-worker") from None
    options = parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    served: Served = build(options)

    from . import calibrate, cost
    from .engine import Engine
    from .kv_pool import KvPool
    from .loop import EngineThread
    from .server import serve

    info = served.info
    if options.calibrate:
        calibrate.command(options.calibrate, served.runner, info, lambda line: print(line, file=sys.stderr, flush=True))
        return
    if options.cost_model:
        info.cost_model.CopyFrom(cost.read(options.cost_model, info))
    elif not info.HasField("cost_model") and not options.mock:
        calibrate.at_start(served.runner, info)
    engine = Engine(served.runner, KvPool(info.blocks, info.block_size), info, lambda: time.monotonic_ns() // 1000)

    def announce(port: int) -> None:
        print(f"scls-worker listening on {options.host}:{port}", flush=True)

    async def until_stopped() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signal_ in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_, stop.set)
        if options.exit_with_parent:
            follow_parent(lambda: loop.call_soon_threadsafe(stop.set))
        await serve(
            info,
            served.tokenizer,
            EngineThread(engine),
            host=options.host,
            port=options.port,
            ring=options.ring,
            on_serving=announce,
            stop=stop,
        )

    asyncio.run(until_stopped())
    # Past this point only an iteration that does not end could keep the process.
    sys.stdout.flush()
    os._exit(0)


def follow_parent(stop: Callable[[], object]) -> None:
    """Stops the worker when its stdin ends: that is, when the process that started it is gone, however it went."""

    def follow() -> None:
        # A stdin that was never open has ended too.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        stop()
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=follow, name="scls-parent", daemon=True).start()


if __name__ == "__main__":
    main()
