"""Round trip of a poll beside a bare ROUTER echo of the same sizes, in turn, in one run."""

import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
import zmq

from kvferry_client import connect
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket
from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role

ROUNDS = 15
CALLS = 2000


def echo(path: str) -> None:
    """A bare ROUTER on the same loop in the same manner, that answers what it gets."""

    async def serve() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = make_socket(context, zmq.ROUTER)
        socket.bind(f"ipc://{path}")
        link = ZmqLink(socket, lambda frames: (link.send(*frames), None)[1])
        await asyncio.Event().wait()

    uvloop.run(serve())


def time_calls(call: Any) -> list[float]:
    """Seconds of each of CALLS calls."""
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure() -> dict[str, Any]:
    """Run both in turn and compare medians."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        path = f"{root}/echo.sock"
        server = multiprocessing.get_context("spawn").Process(target=echo, args=(path,))
        server.start()
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvferry_daemon", "serve", "--runtime-dir", f"{root}/d",
             "--stall-s", "600"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            return _compare(path, Path(root) / "d")
        finally:
            for process in (server, daemon):
                process.kill()
                process.wait() if process is daemon else server.join()
            if daemon.stdout is not None:
                daemon.stdout.close()


def _compare(path: str, directory: Path) -> dict[str, Any]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bare = context.socket(zmq.DEALER)
    bare.connect(f"ipc://{path}")
    layout = Layout(planes=(Plane(name="kv", dtype=Dtype.FLOAT32, shape=(64,)),))
    with connect(directory, layout, "bench") as client:
        client.send("t")
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
        frame = worker.CALLS.encode(worker.Poll(transfers=[watched]))

        def bare_call() -> None:
            bare.send(frame)
            bare.recv()

        def poll_call() -> None:
            client.poll(watched)

        bare_p50, poll_p50, ratios = [], [], []
        for _ in range(ROUNDS):
            one, two = time_calls(bare_call), time_calls(poll_call)
            bare_p50.append(statistics.median(one))
            poll_p50.append(statistics.median(two))
            ratios.append(poll_p50[-1] / bare_p50[-1])
    bare.close(linger=0)
    context.term()
    return {
        "echo_p50_us": round(statistics.median(bare_p50) * 1e6, 1),
        "poll_p50_us": round(statistics.median(poll_p50) * 1e6, 1),
        "poll_to_echo": round(statistics.median(ratios), 3),
        "poll_to_echo_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
