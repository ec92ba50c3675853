"""One daemon in one process: it says when it is ready, runs until a signal, drains and stops."""

import asyncio
import gc
import json
import logging
import os
import signal
import sys

from kvferry_daemon import logs
from kvferry_daemon.config import Config
from kvferry_daemon.daemon import Daemon
from kvferry_daemon.http.listen import listen, url_of
from kvferry_daemon.transports.nixl.agent import has_loaded_nixl

log = logging.getLogger("kvferry_daemon.daemon")  # as whoever reads "ready" and "stopped" knows it
EXIT_LEDGER = 7
GC_THRESHOLDS = (10_000, 50, 100)  # a full pass over thousands of transfers takes 20 ms


async def serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT: the first drains, a second one stops at once."""
    port = config.http_port
    listener = None if port is None else listen(config.http_host, port)
    daemon = Daemon(config)
    facts: dict[str, object] = {"peer_address": daemon.peer_address, "pid": os.getpid()}
    if listener is not None:
        from kvferry_daemon.http.server import HttpServer  # a daemon without it pays nothing

        http = await HttpServer.start(listener, daemon.node, daemon.facts())
        daemon.closed_first = http.close
        facts["http"] = url_of(listener)
    gc.collect()
    gc.freeze()  # what there is now stays; a pass over it would hold the loop up for nothing
    gc.set_threshold(*GC_THRESHOLDS)
    loop = asyncio.get_running_loop()
    stop, now = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: now.set() if stop.is_set() else stop.set())
    print(json.dumps(facts), flush=True)
    if config.is_open_to_all:
        log.warning("INSECURE: whoever reaches %s may pull every payload", daemon.peer_address)
    log.info("ready: %s, runtime directory %s", daemon.peer_address, config.runtime_dir)
    daemon.lag.begin()
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((stopping, daemon.failed), return_when=asyncio.FIRST_COMPLETED)
    if daemon.failed.done():
        log.error("stopping, the ledger cannot be written: %s", daemon.failed.result())
        await daemon.close()
        return EXIT_LEDGER
    log.info("draining")
    draining = asyncio.ensure_future(daemon.drain())
    hurry = asyncio.ensure_future(now.wait())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    drained = draining.done() and draining.result()
    draining.cancel()
    hurry.cancel()
    await daemon.close()
    log.info("stopped%s", "" if drained else "; some transfers had not ended")
    return 0 if drained else 3


def run(config: Config) -> int:
    """Serve on a uvloop event loop."""
    import uvloop

    from kvferry_daemon.timed_loop import TimedLoop

    logs.begin(config.log_level, config.log_format)
    status = uvloop.run(serve(config), loop_factory=TimedLoop)
    if has_loaded_nixl():
        # Its wheel brings a libnl whose destructors crash where the machine has one too, as every
        # one with RDMA has: all is closed by now, so leave without them.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    return status
