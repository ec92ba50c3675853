"""What the core tells of transfers: always how they begin and end, and traced, what lies between."""

from itertools import pairwise
from typing import Any

from core.stories import Story
from kvferry_daemon.core import outside as out
from kvferry_daemon.core import told
from kvferry_daemon.core.events import Key
from kvferry_proto.states import Role, State
from world import BLOCK, Chunk, Machine, World

TOTAL = 20
WINDOW = 8
SOURCE, SINK = Key(Role.SOURCE, "t", 0), Key(Role.SINK, "t", 0)


class Listening(World):
    """Keeps what it is told."""

    def __init__(self, *, traced: bool) -> None:
        super().__init__(window_tokens=WINDOW)
        self.told: list[Any] = []
        for machine in self.machines.values():
            machine.node.chronicle.traced = traced

    def _perform(self, name: str, me: Machine, effect: out.NodeEffect) -> list[out.NodeEvent]:
        if isinstance(effect, told.EVERY):
            self.told.append(effect)
        return super()._perform(name, me, effect)

    def of(self, kind: type[Any], key: Key) -> list[Any]:
        return [one for one in self.told if isinstance(one, kind) and one.key == key]


def test_untraced_only_the_beginning_and_the_end_are_told() -> None:
    world = Listening(traced=False)
    story = Story(total=TOTAL, world=world)
    story.open()
    story.check(story.run())
    for key in (SOURCE, SINK):
        (opened,) = world.of(told.TransferOpened, key)
        (ended,) = world.of(told.TransferEnded, key)
        assert (ended.state, ended.sent_tokens, ended.total_tokens) == (State.SUCCESS, TOTAL, TOTAL)
        assert ended.at_s - ended.took_s == opened.at_s
    assert len(world.told) == 4


def test_traced_windows_follow_each_other_and_chunks_are_all_tokens() -> None:
    world = Listening(traced=True)
    story = Story(total=TOTAL, world=world)
    story.open()
    story.check(story.run())
    windows = world.of(told.WindowMoved, SINK)
    assert [one.base_tokens for one in windows] == [0, *story.resumes]
    for before, after in pairwise(windows):
        assert before.began_s <= before.ended_s <= after.began_s
        assert before.sent_tokens <= before.edge_tokens == before.base_tokens + WINDOW
    for key in (SOURCE, SINK):
        chunks = world.of(told.ChunksMoved, key)
        assert sum(one.tokens for one in chunks) == TOTAL
        assert {one.missed for one in chunks} == {0}
        assert isinstance([one for one in world.told if one.key == key][-1], told.TransferEnded)


def test_chunks_of_a_cut_connection_came_to_nothing() -> None:
    world = Listening(traced=True)
    story = Story(total=TOTAL, world=world)
    story.open()
    world.settle()
    story.produce(BLOCK)
    while not any(isinstance(one, Chunk) for one in world.wire):
        world.deliver()
    (key,) = world.sockets
    world.cut(key)
    for side in (SOURCE, SINK):
        (lost,) = world.of(told.ChunksMoved, side)
        assert (lost.first_token, lost.tokens, lost.chunks, lost.missed) == (0, BLOCK, 1, 1)
    story.check(story.run())


def test_what_is_under_way_at_a_failure_is_told_before_it() -> None:
    world = Listening(traced=True)
    story = Story(total=TOTAL, world=world)
    story.open()
    world.settle()
    story.produce(BLOCK)
    while not any(isinstance(one, Chunk) for one in world.wire):
        world.deliver()
    world.feed("b", out.TransfersAborted((SINK,), "enough"))
    kinds = [type(one) for one in world.told if one.key == SINK]
    assert kinds[-3:] == [told.WindowMoved, told.ChunksMoved, told.TransferEnded]
    assert world.of(told.ChunksMoved, SINK)[0].missed == 1
    assert world.of(told.TransferEnded, SINK)[0].error.code == "aborted"
    world.wait(5)
    assert len(world.of(told.ChunksMoved, SINK)) == 1, "its late end is not told again"
