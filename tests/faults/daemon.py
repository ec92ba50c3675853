"""`python -m faults.daemon`: the `kvferry` command with a trap, and a census on SIGUSR1."""

import asyncio
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from faults.points import set_trap
from kvferry_daemon import ledger, serve
from kvferry_daemon.config import Config

EXECUTORS = ("kvferry-memory", "kvferry-connect", "asyncio")  # their idle threads stay
loops: list[asyncio.AbstractEventLoop] = []


def census() -> dict[str, object]:
    """What this process has: descriptors by kind, threads by name, tasks by name."""
    threads = [thread.name for thread in threading.enumerate()]
    pooled = Counter(name for name in EXECUTORS for one in threads if one.startswith(name))
    others = [name for name in threads if not name.startswith(EXECUTORS)]
    tasks = [task.get_coro() for loop in loops for task in asyncio.all_tasks(loop)]
    return {
        "descriptors": dict(Counter(descriptors())),
        "threads": sorted(others),
        "pooled": dict(pooled),
        "foreign_threads": len(os.listdir("/proc/self/task")) - len(threads),  # libzmq's
        "tasks": sorted(getattr(task, "__qualname__", "?") for task in tasks),
    }


def descriptors() -> list[str]:
    """Every open descriptor: a file's path, or what else it is."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing itself
            continue
        path = Path(target)
        found.append(path.parent.name if path.parent.name == "workers" else target.split(":[")[0])
    return found


def answer(into: Path) -> None:
    """Write a census whenever somebody asks."""
    while True:
        signal.sigwait([signal.SIGUSR1])
        part = into.with_suffix(".part")
        part.write_text(json.dumps(census()))
        part.rename(into)


def main() -> None:
    """Set the trap, then be the daemon."""
    into = Path(os.environ.pop("FAULTS_CENSUS"))
    ledger.GIVE_UP_S = float(os.environ.pop("FAULTS_GIVE_UP_S", ledger.GIVE_UP_S))
    set_trap()
    plain = serve.serve

    async def noted(config: Config) -> int:
        loops.append(asyncio.get_running_loop())
        return await plain(config)

    serve.serve = noted
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # threads to come inherit it
    threading.Thread(target=answer, args=(into,), name="census", daemon=True).start()
    sys.argv[0] = "kvferry"
    from kvferry_daemon.command import main as command

    command()


if __name__ == "__main__":
    main()
