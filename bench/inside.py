"""A daemon that tells what it holds: `python -m bench.inside REPORT serve ...`.

It is `kvferry` itself. At SIGUSR1 it writes to the file REPORT, as JSON, what cannot be seen from
outside: its asyncio tasks, the length of every container that its objects hold, how many objects
of its own types there are. With SOAK_TRACE in the environment it adds where memory was taken.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvferry_daemon import serve as serve_module
from kvferry_daemon.config import Config
from kvferry_daemon.core.allowance import Allowances
from kvferry_daemon.daemon import Daemon

OURS = ("kvferry_daemon.", "kvferry_proto.")
CONTAINERS = (dict, list, set, frozenset, deque)
TRACE = "SOAK_TRACE"
POOLED = "kvferry-memory"  # threads that a pool starts as it needs them, two at most


def books(root: object) -> dict[str, int]:
    """The length of every container held by ``root`` or an object of ours that it holds.

    What lies inside a container is not walked: there are as many as there are transfers, and
    ``objects`` counts them. A Counter's keys are names that we wrote, not what traffic brings. A book
    of rates is not looked at: it forgets its oldest name over a bound of its own, and only then.
    """
    found: dict[str, int] = {}
    seen = {id(root)}
    waiting = deque([("", root)])
    while waiting:
        path, one = waiting.popleft()
        for name, value in _attributes(one):
            at = f"{path}.{name}".lstrip(".")
            if isinstance(value, CONTAINERS) and not isinstance(value, Counter):
                found[at] = len(value)
            elif isinstance(value, Allowances):
                continue
            elif _is_ours(value) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((at, value))
    return found


def _is_ours(value: object) -> bool:
    module = type(value).__module__
    return isinstance(module, str) and module.startswith(OURS)  # of a C type it may be anything


def _attributes(one: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(one, "__dict__", {}).items()
    for kind in type(one).__mro__:
        for name in kind.__dict__.get("__slots__", ()):
            if hasattr(one, name):
                yield name, getattr(one, name)


def objects() -> dict[str, int]:
    """How many objects of each of our types are alive."""
    kinds = Counter(type(one).__qualname__ for one in gc.get_objects() if _is_ours(one))
    return dict(sorted(kinds.items()))


def report(daemon: Daemon) -> Mapping[str, Any]:
    """Everything that must not grow."""
    gc.collect()
    told: dict[str, Any] = {
        "tasks": len(asyncio.all_tasks()),
        "pooled_threads": sum(one.name.startswith(POOLED) for one in threading.enumerate()),
        "books": books(daemon),
        "objects": objects(),
    }
    if tracemalloc.is_tracing():
        lines = tracemalloc.take_snapshot().statistics("lineno")[:40]
        told["memory"] = [f"{one.traceback} {one.size} bytes in {one.count}" for one in lines]
    return told


def serve(tell: Callable[[Daemon], Mapping[str, Any]]) -> None:
    """Be `kvferry`; at SIGUSR1 write what ``tell`` says to the file that the first argument names."""
    path = Path(sys.argv.pop(1))

    class Watched(Daemon):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._report)

        def _report(self) -> None:
            beside = path.with_suffix(".new")
            beside.write_text(json.dumps(tell(self)))
            beside.rename(path)

    serve_module.Daemon = Watched  # type: ignore[attr-defined]
    from kvferry_daemon.command import main

    main()


if __name__ == "__main__":
    if os.environ.get(TRACE):
        tracemalloc.start(4)
    serve(report)
