"""Polls of the status board beside polls by message, and what the board costs the daemon."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvferry_client import Client, connect
from kvferry_daemon.core.boards import SLOTS
from kvferry_daemon.memory.board import Board
from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State

ROUNDS = 7
LOOKS = 20_000
CALLS = 1000
LAYOUT = Layout(planes=(Plane(name="kv", dtype=Dtype.FLOAT32, shape=(64,)),))


def measure() -> dict[str, Any]:
    """Run everything in turn, several times over, and take medians."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvferry_daemon", "serve", "--runtime-dir", f"{root}/d",
             "--stall-s", "600"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            with connect(Path(root) / "d", LAYOUT, "bench") as client:
                looks = _polls(client) | _readies(client)
            return looks | {"show_p50_us": _show(Path(root) / "board")}
        finally:
            daemon.kill()
            daemon.wait()
            if daemon.stdout is not None:
                daemon.stdout.close()


def _p50_us(call: Callable[[], object], calls: int) -> float:
    """Of single calls, less what reading the clock takes."""
    clock = time.perf_counter_ns
    spans, empty = [], []
    for _ in range(calls):
        start = clock()
        call()
        spans.append(clock() - start)
    for _ in range(calls):
        start = clock()
        empty.append(clock() - start)
    return (statistics.median(spans) - statistics.median(empty)) / 1e3


def _polls(client: Client) -> dict[str, Any]:
    client.send("t")
    watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
    message = worker.Poll(transfers=[watched])
    newest = client.poll(watched).transfers[0]
    behind = watched.model_copy(update={"after": newest.snapshot})
    board, nothing, by_message = [], [], []
    for _ in range(ROUNDS):
        board.append(_p50_us(lambda: client.poll(watched), LOOKS))
        nothing.append(_p50_us(lambda: client.poll(behind), LOOKS))
        by_message.append(_p50_us(lambda: client.call(message), CALLS))
    assert client.poll(watched).transfers[0] is client.poll(watched).transfers[0]
    assert client.board_trouble is None
    return {
        "unchanged_p50_us": round(statistics.median(board), 2),
        "unchanged_p50_us_range": [round(min(board), 2), round(max(board), 2)],
        "nothing_new_p50_us": round(statistics.median(nothing), 2),
        "by_message_p50_us": round(statistics.median(by_message), 1),
    }


def _readies(client: Client) -> dict[str, Any]:
    """The same call that changes a transfer, whether it is on the board or not, in turn."""
    shown, hidden, looks = [], [], []
    client.send("shown", window_tokens=8192)
    client.send("hidden", window_tokens=8192)
    watched = worker.Watched(role=Role.SOURCE, transfer_id="shown")
    client.poll(watched)
    clock = time.perf_counter_ns
    for ready in range(1, CALLS * 2):
        spans = {}
        for name in ("shown", "hidden") if ready % 2 else ("hidden", "shown"):
            call = worker.Ready(transfer_id=name, ready_tokens=ready)
            start = clock()
            client.call(call)
            spans[name] = clock() - start
        shown.append(spans["shown"])
        hidden.append(spans["hidden"])
        start = clock()
        client.poll(watched)
        looks.append(clock() - start)
    return {
        "changed_p50_us": round(statistics.median(looks) / 1e3, 2),
        "ready_on_board_p50_us": round(statistics.median(shown) / 1e3, 1),
        "ready_off_board_p50_us": round(statistics.median(hidden) / 1e3, 1),
    }


def _show(path: Path) -> float:
    """What the daemon's loop spends to write one slot."""
    board = Board.create(path, SLOTS, "0" * 32, 3.0)
    snapshot = worker.Snapshot(
        role=Role.SOURCE, transfer_id="t", attempt=0, snapshot=1, state=State.TRANSFERRING,
        runs=[(0, 64)], slot=worker.BoardSlot(index=0, key=1),
    )  # fmt: skip
    spent = statistics.median(_p50_us(lambda: board.show(snapshot), LOOKS) for _ in range(ROUNDS))
    board.remove()
    return round(spent, 2)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
