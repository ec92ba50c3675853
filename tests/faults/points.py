"""Named places in the real code at which a process can be caught: a table, and what patches it.

KVFERRY_FAILPOINT="name@3=/dir" in the environment: at the third hit after ``/dir/armed`` is there,
the thread that comes by writes ``/dir/hit`` and stands still until ``/dir/go`` is there.
"""

import functools
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgpack

VARIABLE = "KVFERRY_FAILPOINT"
LOOK_S = 0.005
DAEMON, TCP, CLIENT = "kvferry_daemon", "kvferry_daemon.transports.tcp", "kvferry_client"


class Point(NamedTuple):
    """``where`` is module:name; ``only`` names a type among the arguments.

    ``arm``: *warm*, in processes that have moved a payload before; *fresh*, in a process that was
    just started without a past; *restart*, in a daemon that takes up a live transfer.
    ``hits``: so many are reached in every run.
    """

    where: str
    when: Literal["before", "after", "inside"]
    only: str = ""
    hits: int = 1
    arm: Literal["warm", "fresh", "restart"] = "warm"


def _around(name: str, where: str, only: str = "", hits: int = 1, arm: Any = "warm") -> Any:
    return {f"{name}.{w}": Point(where, w, only, hits, arm) for w in ("before", "after")}


FEED, LEDGER = f"{DAEMON}.effects:Effects.feed", f"{DAEMON}.ledger:Ledger._commit"
TO_WORKER, TO_SOURCE, TO_SINK = (
    f"{DAEMON}.outbound:Outbound.{name}" for name in ("to_worker", "to_source", "to_sink")
)
EXCHANGE, SEND = (f"{CLIENT}.connection:Connection.{name}" for name in ("_exchange", "_send"))
EVENT = f"{DAEMON}.streams:Streams._on"

POINTS: dict[str, Point] = {
    **_around("sink.ledger", LEDGER, hits=9),
    **_around("source.ledger", LEDGER, hits=5),
    "sink.written": Point(f"{DAEMON}.effects:Effects.on_written", "before", hits=9),
    "source.written": Point(f"{DAEMON}.effects:Effects.on_written", "before", hits=5),
    **_around("sink.answer", TO_WORKER, "Snapshots", 6),
    **_around("source.answer", TO_WORKER, "Snapshots", 6),
    **_around("sink.pull", TO_SOURCE, "Pulls", 5),
    "source.pull-handled": Point(FEED, "after", "Pulls", 5),
    **_around("source.progress", TO_SINK, "Progresses", 5),
    "source.transmit": Point(f"{DAEMON}.effects:Effects._transmit", "before", hits=4),
    "source.chunk-half-sent": Point(f"{TCP}.sender:StreamSender._send_all", "inside", hits=4),
    "source.chunk-sent": Point(f"{EVENT}_source_event", "before", "Sent", 4),
    **_around("sink.claim", f"{DAEMON}.streams:Streams.expect", hits=4),
    "sink.chunk-half-received": Point(f"{TCP}.receiver:StreamReceiver._must_fill", "inside", "", 4),
    "sink.chunk-not-posted": Point(f"{TCP}.receiver:StreamReceiver._receive", "after", hits=4),
    "sink.chunk-received": Point(f"{EVENT}_sink_event", "before", "Received", 4),
    **_around("sink.resume", FEED, "Resume", 3),
    "sink.free": Point(f"{DAEMON}.core.pool:BlockPool.free_front", "after", hits=3),
    "source.free": Point(f"{DAEMON}.core.pool:BlockPool.free_front", "after", hits=3),
    **_around("sink.zero", f"{DAEMON}.memory.host:HostPool.zero"),
    "source.zero": Point(f"{DAEMON}.memory.host:HostPool.zero", "after"),
    **_around("sink.done", TO_SOURCE, "Done"),
    "source.done": Point(FEED, "before", "Done"),
    **_around("source.done-noted", TO_SINK, "DoneNoted"),
    # a daemon without a past
    "sink.pool-made": Point(f"{DAEMON}.memory.host:HostPool.create", "after", arm="fresh"),
    "source.pool-made": Point(f"{DAEMON}.memory.host:HostPool.create", "after", arm="fresh"),
    "sink.hello": Point(FEED, "before", "Hello", arm="fresh"),
    **_around("sink.welcome", TO_WORKER, "Welcome", arm="fresh"),
    "source.peer-hello": Point(FEED, "before", "PeerHello", arm="fresh"),
    "source.peer-welcome": Point(TO_SINK, "after", "PeerWelcome", arm="fresh"),
    **_around("source.ticket", TO_SINK, "Ticket", arm="fresh"),
    "source.accept": Point(f"{TCP}.listener:Listener._greet", "before", arm="fresh"),
    "source.ticket-shown": Point(f"{TCP}.listener:Listener._check", "after", arm="fresh"),
    **_around("sink.connect", f"{DAEMON}.streams:connect", arm="fresh"),
    "sink.connected": Point(f"{EVENT}_connected", "before", arm="fresh"),
    # a daemon's next life
    "sink.ledger-read": Point(f"{DAEMON}.daemon:begin", "after", arm="restart"),
    "sink.pools-attached": Point(f"{DAEMON}.pools:Pools.attach", "after", arm="restart"),
    **_around("sink.restore", FEED, "Restored", arm="restart"),
    **_around("source.restore", FEED, "Restored", arm="restart"),
    # workers
    "prefill.lock-taken": Point(f"{CLIENT}.session:Lock.__init__", "after", arm="fresh"),
    "decode.lock-taken": Point(f"{CLIENT}.session:Lock.__init__", "after", arm="fresh"),
    "decode.joined": Point(f"{CLIENT}.session:Session._join", "after", arm="fresh"),
    **_around("prefill.send", EXCHANGE, "Send"),
    "prefill.send-on-its-way": Point(SEND, "after", "Send"),
    **_around("prefill.scatter", f"{CLIENT}.views:WindowView.scatter", hits=6),
    **_around("prefill.ready", EXCHANGE, "Ready", 6),
    "prefill.ready-on-its-way": Point(SEND, "after", "Ready", 6),
    **_around("prefill.release", EXCHANGE, "Release"),
    **_around("decode.receive", EXCHANGE, "Receive"),
    "decode.receive-on-its-way": Point(SEND, "after", "Receive"),
    "decode.poll": Point(SEND, "after", "Poll", 4),
    **_around("decode.gather", f"{CLIENT}.views:WindowView.gather", hits=6),
    **_around("decode.resume", EXCHANGE, "Resume", 3),
    "decode.resume-on-its-way": Point(SEND, "after", "Resume", 3),
    **_around("decode.release", EXCHANGE, "Release"),
}


class Trap:
    """Counts the hits of one point, and catches the thread of one of them."""

    def __init__(self, nth: int, directory: Path) -> None:
        self._left = nth
        self._directory = directory
        self._lock = threading.Lock()

    def pass_by(self) -> None:
        """Stand still if this is the hit that was asked for."""
        with self._lock:
            if self._left == 0 or not (self._directory / "armed").exists():
                return
            self._left -= 1
            if self._left:
                return
        (self._directory / "hit").touch()
        while not (self._directory / "go").exists():
            time.sleep(LOOK_S)


def set_trap() -> None:
    """Patch the real code as the environment says; the variable goes, for daemons refuse it."""
    told = os.environ.pop(VARIABLE, "")
    if told:
        point, _, directory = told.partition("=")
        name, _, nth = point.partition("@")
        _patch(POINTS[name], Trap(int(nth), Path(directory)))


def _patch(point: Point, trap: Trap) -> None:
    module, _, path = point.where.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    given = vars(owner)[name]
    real = given.__func__ if isinstance(given, classmethod) else given
    wrapped = _wrapped(real, point, trap)
    setattr(owner, name, classmethod(wrapped) if isinstance(given, classmethod) else wrapped)


def _wrapped(real: Callable[..., Any], point: Point, trap: Trap) -> Callable[..., Any]:
    @functools.wraps(real)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if point.when == "inside":
            return _in_halves(real, trap, *args)
        meant = not point.only or point.only in _types(args)
        if meant and point.when == "before":
            trap.pass_by()
        result = real(*args, **kwargs)
        if meant and point.when == "after":
            trap.pass_by()
        return result

    return wrapper


def _in_halves(real: Callable[..., Any], trap: Trap, self: Any, buffers: list[Any]) -> None:
    """Do to the first half of some buffers what is done to all of them, pass by, do the rest."""
    left = sum(len(buffer) for buffer in buffers) // 2
    first, rest = [], []
    for buffer in buffers:
        first.append(memoryview(buffer)[:left])
        rest.append(memoryview(buffer)[left:])
        left = max(0, left - len(buffer))
    real(self, [one for one in first if len(one)])
    trap.pass_by()
    real(self, [one for one in rest if len(one)])


def _types(args: tuple[Any, ...]) -> Iterator[str]:
    """Types of the arguments, and of the messages in them."""
    for arg in args:
        if isinstance(arg, bytes) and type(args[0]).__name__ == "Connection":
            yield msgpack.unpackb(arg)["kind"].title()
        yield type(arg).__name__
        for name in ("message", "call"):
            yield type(getattr(arg, name, None)).__name__
