"""A daemon that tells where its time goes: `python -m bench.staged REPORT serve ...`.

It is `kvferry` itself with clocks around the stages of a chunk. At SIGUSR1 it writes to the file
REPORT, as JSON, how often each stage was passed and how much CPU of its thread it took, stages in
stages left out; and how much CPU each kind of thread took in all.
"""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from bench.inside import serve
from kvferry_daemon.core.node import Node
from kvferry_daemon.daemon import Daemon
from kvferry_daemon.effects import Effects
from kvferry_daemon.ledger import Ledger
from kvferry_daemon.links.zmq_link import ZmqLink
from kvferry_daemon.pools import Pools
from kvferry_daemon.transports.tcp.receiver import StreamReceiver
from kvferry_daemon.transports.tcp.sender import StreamSender
from kvferry_proto.codec import Codec

STAGES: list[tuple[str, type, str]] = [
    ("decode a message", Codec, "decode"),
    ("encode a message", Codec, "encode"),
    ("decide", Node, "handle"),
    ("find where bytes lie", Pools, "place"),
    ("do the rest of the effects", Effects, "_perform"),
    ("send messages", ZmqLink, "send"),
    ("commit rows", Ledger, "_commit"),
    ("send: kernel", StreamSender, "_send_all"),
    ("send: checksum and the rest", StreamSender, "_send_queued"),
    ("receive: kernel", StreamReceiver, "_fill"),
    ("receive: checksum and the rest", StreamReceiver, "_take_chunk"),
]


class Clocks:
    """CPU of each stage; a stage in another one's time stops that one's clock."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.cpu_ns: dict[str, int] = defaultdict(int)
        self._of_thread = threading.local()

    def around(self, stage: str, right: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a clock."""

        @functools.wraps(right)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inside = self._of_thread.__dict__.setdefault("inside", [])
            inside.append(0)
            begun_ns = time.thread_time_ns()
            try:
                return right(*args, **kwargs)
            finally:
                took_ns = time.thread_time_ns() - begun_ns
                self.calls[stage] += 1
                self.cpu_ns[stage] += took_ns - inside.pop()
                if inside:
                    inside[-1] += took_ns

        return timed


CLOCKS = Clocks()


def shown(_daemon: Daemon) -> Mapping[str, Any]:
    """What the clocks show; called on the loop."""
    loop_ns, all_ns = time.thread_time_ns(), time.process_time_ns()
    return {"calls": CLOCKS.calls, "cpu_ns": CLOCKS.cpu_ns, "loop_ns": loop_ns, "all_ns": all_ns}


if __name__ == "__main__":
    for stage, owner, name in STAGES:
        setattr(owner, name, CLOCKS.around(stage, getattr(owner, name)))
    serve(shown)
