"""Daemon-to-daemon bytes beside raw TCP with the same socket calls, in turn, in one run.

Two processes, each with a pool on tmpfs; the pieces are scattered over it. `raw` is sendmsg of
about 1 MiB and recvmsg_into with MSG_WAITALL; kvferry is StreamSender and StreamReceiver with
headers, claims and events, without and with checksum. Received bytes are verified.
"""

import hashlib
import json
import multiprocessing
import queue
import random
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.transports.tcp.events import Received, StreamEvent
from kvferry_daemon.transports.tcp.listener import SOCKET_BUFFER_BYTES
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import SendJob, StreamSender

TOTAL_BYTES = 256 << 20
STEP_BYTES = 1 << 20
PIECES = (64 << 10, 1 << 20)
ROUNDS = 7
WAYS = ("raw", "plain", "checksum")


def views(pool: HostPool, order: list[int]) -> list[list[memoryview]]:
    """The pool's pieces in this order, in groups of about 1 MiB."""
    group = max(1, STEP_BYTES // pool.block_bytes)
    pieces = [pool.view(block, 1) for block in order]
    return [pieces[first : first + group] for first in range(0, len(pieces), group)]


def tune(sock: socket.socket) -> socket.socket:
    """The options that kvferry sets."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return sock


def send_raw(sock: socket.socket, groups: list[list[memoryview]]) -> None:
    """The same calls as the sender's, and nothing else."""
    for group in groups:
        want = sum(len(view) for view in group)
        assert sock.sendmsg(group) == want


def serve(root: str, piece_bytes: int, port: int, order: list[int], pipe: Connection) -> None:
    """The sending process: a filled pool; for each way that the pipe names, one connection."""
    blocks = TOTAL_BYTES // piece_bytes
    pool = HostPool.create(Path(root) / "source", piece_bytes, blocks)
    filler = random.Random(1)
    for block in range(blocks):
        pool.view(block, 1)[:] = filler.randbytes(piece_bytes)
    digest = hashlib.blake2b(b"".join(pool.view(b, 1) for b in order)).digest()
    groups = views(pool, order)
    pipe.send(digest)
    while (way := pipe.recv()) is not None:
        sock = tune(socket.create_connection(("127.0.0.1", port)))
        pipe.recv()  # go
        if way == "raw":
            send_raw(sock, groups)
            sock.close()
            continue
        events: queue.Queue[StreamEvent] = queue.Queue()
        sender = StreamSender(sock, "bench", events.put, way == "checksum")
        for index, group in enumerate(groups):
            sender.put(SendJob(None, 1, index, 1, group))
        for _ in groups:
            events.get()
        pipe.recv()  # all has been received
        sender.close()
    pool.remove()


def receive(way: str, listener: socket.socket, groups: list[list[memoryview]], pipe: Any) -> float:
    """Seconds from the first byte asked for to the last one in place."""
    pipe.send(way)
    sock = tune(listener.accept()[0])
    if way == "raw":
        pipe.send("go")
        start = time.perf_counter()
        for group in groups:
            want = sum(len(view) for view in group)
            assert sock.recvmsg_into(group, 0, socket.MSG_WAITALL)[0] == want
        seconds = time.perf_counter() - start
        sock.close()
        return seconds
    events: queue.Queue[StreamEvent] = queue.Queue()
    receiver = StreamReceiver(sock, "bench", events.put)
    for index, group in enumerate(groups):
        receiver.claim(1, index, 1, group)
    pipe.send("go")
    start = time.perf_counter()
    for _ in groups:
        event = events.get()
        assert isinstance(event, Received), event
    seconds = time.perf_counter() - start
    pipe.send("done")
    receiver.close()
    return seconds


def measure_piece(piece_bytes: int) -> dict[str, Any]:
    """All ways in turn for one size of pieces."""
    blocks = TOTAL_BYTES // piece_bytes
    orders = [random.Random(seed).sample(range(blocks), blocks) for seed in (2, 3)]
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as root,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        port = listener.getsockname()[1]
        child = multiprocessing.get_context("spawn").Process(
            target=serve, args=(root, piece_bytes, port, orders[0], theirs)
        )
        child.start()
        digest = ours.recv()
        pool = HostPool.create(Path(root) / "sink", piece_bytes, blocks)
        groups = views(pool, orders[1])
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                pool.zero(0, blocks)
                seconds[way].append(receive(way, listener, groups, ours))
                got = hashlib.blake2b(b"".join(pool.view(b, 1) for b in orders[1])).digest()
                assert got == digest, way
        ours.send(None)
        child.join()
        pool.remove()
    rates = {way: TOTAL_BYTES / statistics.median(s) / 1e9 for way, s in seconds.items()}
    result: dict[str, Any] = {f"{way}_gb_per_s": round(rate, 2) for way, rate in rates.items()}
    for way in WAYS[1:]:
        ratios = [raw / one for raw, one in zip(seconds["raw"], seconds[way], strict=True)]
        result[f"{way}_to_raw"] = round(statistics.median(ratios), 3)
        result[f"{way}_to_raw_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return result


def measure() -> dict[str, Any]:
    """Every size of pieces."""
    return {f"{size >> 10}_KiB": measure_piece(size) for size in PIECES}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
