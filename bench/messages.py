"""Polls beside a bare ROUTER echo of the same frames: one and 32 outstanding, and many a frame.

Client and server take turns in one run; the client sends frames made before and does not look
into the answers, so that both figures are the server's. One worker's own way, `Client.poll`, is
timed as well, with models and all.
"""

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop
import zmq

from bench.figures import ratios, spread
from bench.probe import LAYOUT
from bench.served import ServedDaemon
from bench.source_worker import batched
from bench.wire import Wire
from kvferry_client import Client, connect
from kvferry_daemon.links.zmq_link import ZmqLink, make_socket
from kvferry_proto import worker
from kvferry_proto.states import Role

ROUNDS = 9
CALLS = 2000
OUTSTANDING = 32
BATCH_TRANSFERS = 1000
BATCH_CALLS = 50


def echo(path: str) -> None:
    """A bare ROUTER on the same loop in the same manner, that answers what it gets."""

    async def serve() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = make_socket(context, zmq.ROUTER)
        socket.bind(f"ipc://{path}")
        link = ZmqLink(socket, lambda frames: (link.send(*frames), None)[1])
        await asyncio.Event().wait()

    uvloop.run(serve())


def time_one(call: Callable[[], object], calls: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def round_trip(socket: zmq.Socket[bytes], frame: bytes) -> Callable[[], object]:
    """A call of `time_one`."""

    def call() -> bytes:
        socket.send(frame)
        return socket.recv()

    return call


def rate(socket: zmq.Socket[bytes], frame: bytes, calls: int) -> float:
    """Calls a second with OUTSTANDING under way."""
    start = time.perf_counter()
    for _ in range(OUTSTANDING):
        socket.send(frame)
    for _ in range(calls - OUTSTANDING):
        socket.recv()
        socket.send(frame)
    for _ in range(OUTSTANDING):
        socket.recv()
    return calls / (time.perf_counter() - start)


def open_sends(client: Client, first: int, end: int) -> list[worker.Snapshot]:
    """Source sides that hold a block each and wait for their sinks: live, and quiet."""
    tokens = LAYOUT.block_size_tokens
    numbers = range(first, end)
    return batched(
        client, [worker.Send(transfer_id=f"live-{i}", window_tokens=tokens) for i in numbers]
    )


def poll_frame(watched: list[worker.Watched]) -> bytes:
    """A poll that is answered at once."""
    return worker.CALLS.encode(worker.Poll(transfers=watched))


def watch(seen: worker.Snapshot, after: int = -1) -> worker.Watched:
    """A transfer in a poll."""
    return worker.Watched(role=Role.SOURCE, transfer_id=seen.transfer_id, after=after)


class Scene:
    """A daemon, an echo, and a connection to each."""

    def __init__(self, stack: ExitStack, transfers: int) -> None:
        root = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        path = f"{root}/echo.sock"
        server = multiprocessing.get_context("spawn").Process(target=echo, args=(path,))
        server.start()
        stack.callback(server.join)
        stack.callback(server.kill)
        daemon = stack.enter_context(
            ServedDaemon(
                Path(root) / "daemon",
                stall_s=600,
                lease_s=600,
                source_share=1,
                window_tokens=LAYOUT.block_size_tokens,
                pool_tokens=(transfers + 1) * LAYOUT.block_size_tokens,
            )
        )
        context: zmq.Context[zmq.Socket[bytes]] = stack.enter_context(zmq.Context())
        self.echo = context.socket(zmq.DEALER)
        stack.callback(self.echo.close, linger=0)
        self.echo.connect(f"ipc://{path}")
        self.client = stack.enter_context(connect(daemon.directory, LAYOUT, "bench"))
        wire = Wire(daemon.directory, LAYOUT)
        stack.callback(wire.close)
        self.wire = wire
        self.daemon = daemon


def measure(
    rounds: int = ROUNDS, calls: int = CALLS, transfers: int = BATCH_TRANSFERS
) -> dict[str, Any]:
    """Round trips, rates, and transfers a second by batch polls."""
    with ExitStack() as stack:
        scene = Scene(stack, transfers)
        seen = open_sends_on(scene.wire, transfers)
        own = open_sends(scene.client, transfers, transfers + 1)[0]
        frame = poll_frame([watch(seen[0])])
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, value in _one_round(scene, frame, seen, own, calls).items():
                found.setdefault(name, []).append(value)
    result: dict[str, Any] = {"rounds": rounds, "batch_transfers": transfers}
    result |= {name: spread(values) for name, values in found.items()}
    result["poll_to_echo"] = ratios(found["poll_p50_us"], found["echo_p50_us"])
    result["client_poll_to_echo"] = ratios(found["client_poll_p50_us"], found["echo_p50_us"])
    result["poll_rate_to_echo"] = ratios(found["poll_32_per_s"], found["echo_32_per_s"])
    return result


def _one_round(
    scene: Scene, frame: bytes, seen: list[worker.Snapshot], own: worker.Snapshot, calls: int
) -> dict[str, float]:
    bare, daemon = scene.echo, scene.wire.socket
    unchanged = poll_frame([watch(one, one.snapshot) for one in seen])
    told = poll_frame([watch(one) for one in seen])
    return {
        "echo_p50_us": time_one(round_trip(bare, frame), calls) * 1e6,
        "poll_p50_us": time_one(round_trip(daemon, frame), calls) * 1e6,
        "client_poll_p50_us": time_one(lambda: scene.client.poll(watch(own)), calls) * 1e6,
        "echo_32_per_s": rate(bare, frame, 2 * calls),
        "poll_32_per_s": rate(daemon, frame, 2 * calls),
        "batch_transfers_per_s": len(seen) / time_one(round_trip(daemon, unchanged), BATCH_CALLS),
        "batch_told_transfers_per_s": len(seen) / time_one(round_trip(daemon, told), BATCH_CALLS),
    }


def open_sends_on(wire: Wire, count: int) -> list[worker.Snapshot]:
    """`open_sends` on a bare connection: a transfer belongs to the worker that opened it."""
    tokens = LAYOUT.block_size_tokens
    found: list[worker.Snapshot] = []
    for number in range(count):
        name = f"live-{number}"
        wire.call(worker.Send(transfer_id=name, window_tokens=tokens))
    for number in range(count):
        watched = worker.Watched(role=Role.SOURCE, transfer_id=f"live-{number}")
        found += wire.call(worker.Poll(transfers=[watched])).transfers
    return found


def measure_live(live: tuple[int, ...], rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, Any]:
    """One poll's round trip while so many transfers are live."""
    with ExitStack() as stack:
        scene = Scene(stack, max(live))
        seen = open_sends_on(scene.wire, 1)
        frame = poll_frame([watch(seen[0])])
        found: dict[str, Any] = {"rounds": rounds}
        costs: list[list[float]] = []
        opened = 1
        for count in live:
            open_sends(scene.client, opened, count)
            opened = count
            assert sum(scene.daemon.status().transfers.values()) == count
            poll, bare = [], []
            for _ in range(rounds):
                bare.append(time_one(round_trip(scene.echo, frame), calls) * 1e6)
                poll.append(time_one(round_trip(scene.wire.socket, frame), calls) * 1e6)
            found[f"live_{count}_poll_p50_us"] = spread(poll)
            found[f"live_{count}_poll_to_echo"] = ratios(poll, bare)
            costs.append([one / other for one, other in zip(poll, bare, strict=True)])
        found["most_to_fewest"] = ratios(costs[-1], costs[0])
        return found
