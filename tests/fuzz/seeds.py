"""What frames and rows look like: the golden ones, and those of a story that was told."""

from functools import cache
from typing import Any, NamedTuple

from core.stories import SINK, SOURCE, Story
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.peer_effects import Say
from kvferry_proto import peer, worker
from vectors import make
from world import BLOCK, Machine, World


class Told(NamedTuple):
    """What went in and out of two daemons, as bytes, by which way it came."""

    calls: list[bytes]
    to_source: list[bytes]  # said by a sink's daemon
    to_sink: list[bytes]  # said by a source's daemon
    rows: list[tuple[str, bytes]]


@cache
def golden() -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Frames of every kind of every socket, and those that are to be refused."""
    files = make.files()
    good = [one for name in make.FAMILIES for one in files[name]]
    return _frames(good), _frames(files["refused"])


def _frames(entries: list[dict[str, Any]]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(one["frame_hex"]) for one in entries)


@cache
def golden_board() -> tuple[bytes, ...]:
    """Slots of a status board, and its header."""
    return tuple(bytes.fromhex(one["hex"]) for one in make.files()["board"])


class Listening(World):
    """A world that writes down what reaches its daemons, and what they would keep."""

    def __init__(self, told: Told) -> None:
        self.told = told
        super().__init__()

    def feed(self, name: str, event: out.NodeEvent) -> None:
        match event:
            case out.WorkerCalled():
                self.told.calls.append(worker.CALLS.encode(event.call))
            case out.SinkSaid():
                self.told.to_source.append(peer.MESSAGES.encode(event.message))
            case out.SourceSaid():
                self.told.to_sink.append(peer.MESSAGES.encode(event.message))
        super().feed(name, event)

    def _perform(self, name: str, me: Machine, effect: out.NodeEffect) -> list[out.NodeEvent]:
        if isinstance(effect, out.Write) and name == "b":
            self.told.rows.extend((row, body) for row, body in effect.rows if body is not None)
        if isinstance(effect, Say) and not isinstance(effect.message, peer.PeerHello):
            self.told.to_source.append(peer.MESSAGES.encode(effect.message))
        return super()._perform(name, me, effect)


def half_told(story: Story) -> Story:
    """Two windows of four have been moved, and more is on its way."""
    story.open()
    for _ in range(2):
        story.world.wait(0.3)
        story.produce()
        story.world.wait(0.3)
        seen = story.sink()
        story.take(seen)
        story.resume(seen.sent_tokens)
    story.produce()
    return story


@cache
def told() -> Told:
    """Everything of one story, from hello to the end."""
    found = Told([], [], [], [])
    story = Story(8 * BLOCK, world=Listening(found))
    half_told(story).run()
    for route, name in ((SOURCE, "a"), (SINK, "b")):
        story.world.call(name, route, worker.Heartbeat())
    return found
