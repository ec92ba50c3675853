"""Copies between pools by real threads: every byte, and what becomes of claims and served extents."""

import asyncio
import threading
from pathlib import Path

import pytest

from kvferry_daemon.copies import THREADS, Copies, copy
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.allocator import Run
from kvferry_daemon.core.events import Key, StreamKey
from kvferry_daemon.core.window import Place as Where
from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.places import whole
from kvferry_daemon.transports.tcp.staging import Place, Staging
from kvferry_proto.layout import Order
from kvferry_proto.peer import PARTS_MAX
from kvferry_proto.states import Role
from slicing import Group, Move, PlaneKind, Window, content, layout_of

WAIT_S = 10.0
HERE = StreamKey.here("ab" * 16)
OWNER = Key(Role.SOURCE, "t", 0)
KINDS = [PlaneKind(2, (16,)), PlaneKind(None, (32,))]  # no padding in blocks of two tokens or more


@pytest.mark.parametrize(("first", "tokens"), [(0, 20), (2, 14), (6, 13)])
def test_whole_blocks_of_two_pools_that_lie_otherwise(
    tmp_path: Path, first: int, tokens: int
) -> None:
    """Equal layouts, as on two devices; the last block part full."""
    layout = layout_of(KINDS, 1, 2, Order.NHD)
    pools = [HostPool.create(tmp_path / name, layout.block_bytes, 16) for name in "ab"]
    runs = [((9, 2), (1, 5), (0, 1), (14, 2)), ((3, 1), (7, 6), (0, 3))]
    for number, pool in enumerate(pools):
        view = pool.view(0, 16)
        view[:] = bytes((place * 31 + number) % 251 for place in range(len(view)))
    places = [
        whole(pool, layout, where, 0, first, tokens)
        for pool, where in zip(pools, runs, strict=True)
    ]
    source, sink = (place for place in places if isinstance(place, list))
    assert [len(view) for view in source] != [len(view) for view in sink]
    before = bytes(pools[1].view(0, 16))
    wanted = b"".join(source)
    copy(source, sink, Staging())
    assert b"".join(sink) == wanted
    changed = sum(a != b for a, b in zip(before, pools[1].view(0, 16), strict=True))
    assert changed <= len(wanted)


@pytest.mark.parametrize(("sources", "sinks"), [(1, 1), (2, 1), (1, 2)])
def test_slices_of_other_ranks_orders_and_block_sizes(sources: int, sinks: int) -> None:
    made, staging = content(KINDS, 29), Staging()
    source = Group(layout_of(KINDS, sources, 4, Order.HND), sources, Window(0, ((9, 3), (1, 5))))
    layout = layout_of(KINDS, sinks, 8, Order.NHD)
    sink, expected = (Group(layout, sinks, Window(0, ((2, 1), (0, 1), (4, 2)))) for _ in "ab")
    source.fill(made, 0, 29)
    expected.fill(made, 0, 29)
    move = Move(source, sink)
    for part in move.parts:
        for first, tokens in move.chunks(0, 29, 3):
            copy(*move.extents(part, first, tokens), staging)
    assert sink.pools == expected.pools


def test_whole_blocks_on_one_side_alone() -> None:
    """In blocks without padding, all slices of a part are the whole block."""
    made = content([PlaneKind(None, (64,))], 8)
    layout = layout_of([PlaneKind(None, (64,))], 1, 4, Order.NHD)
    one, two = (Group(layout, 1, Window(0, ((1, 2),))) for _ in "ab")
    one.fill(made, 0, 8)
    move = Move(one, two)
    gathered, scattered = move.extents(move.parts[0], 0, 8)
    views = [memoryview(one.pools[0])[layout.block_bytes : 3 * layout.block_bytes]]
    copy(views, scattered, Staging())
    assert two.pools == one.pools
    target = bytearray(len(views[0]))
    copy(gathered, [memoryview(target)[:10], memoryview(target)[10:]], Staging())
    assert target == views[0]


def test_other_sizes_are_refused_and_nothing_is_copied() -> None:
    source, sink = bytearray(b"abcd"), bytearray(3)
    with pytest.raises(ValueError, match="4 bytes into 3"):
        copy([memoryview(source)], [memoryview(sink)], Staging())
    assert sink == bytes(3)


# --- claims and served extents ---


class Gate:
    """Bytes that a thread can only read once somebody opens."""

    payload_bytes = 4

    def __init__(self) -> None:
        self.begun, self.open = threading.Semaphore(0), threading.Event()

    def gather(self, out: memoryview) -> None:
        self.begun.release()
        assert self.open.wait(WAIT_S)
        out[:] = b"late"

    def scatter(self, data: memoryview) -> None:
        raise NotImplementedError


class Bench:
    """Copies on a loop, and the events that come of them."""

    def __init__(self) -> None:
        self.events: list[out.NodeEvent] = []
        self.came = asyncio.Event()
        self.copies = Copies(self.feed)

    def feed(self, event: out.NodeEvent) -> None:
        self.events.append(event)
        self.came.set()

    def expect(self, handle: int, first_token: int, place: Place) -> None:
        where = Where(0, (Run(0, 1),))
        self.copies.expect(out.Expect(HERE, "p", handle, first_token, 4, where), place)

    def transmit(self, handle: int, first_token: int, place: Place) -> None:
        part, where = handle % PARTS_MAX, Where(0, (Run(0, 1),))
        effect = out.Transmit(HERE, OWNER, part, "q", handle, first_token, 4, where)
        self.copies.transmit(effect, place)

    async def wait(self, events: int) -> list[out.NodeEvent]:
        """Until so many have come."""
        async with asyncio.timeout(WAIT_S):
            while len(self.events) < events:
                self.came.clear()
                await self.came.wait()
        return self.events


def sent(first_token: int, part: int = 0) -> out.ChunkSent:
    return out.ChunkSent(HERE, OWNER, part, first_token, 4)


def test_a_claimed_extent_is_copied_and_both_sides_are_told() -> None:
    async def main() -> None:
        bench, target = Bench(), bytearray(4)
        bench.expect(PARTS_MAX + 1, 8, [memoryview(target)])
        bench.transmit(PARTS_MAX + 1, 8, [memoryview(bytearray(b"abcd"))])
        received = out.ChunkReceived(HERE, PARTS_MAX + 1, 8, 4)
        assert await bench.wait(2) == [sent(8, 1), received]
        assert target == b"abcd"
        bench.copies.close()

    asyncio.run(main())


def test_what_nobody_claims_is_left_and_its_blocks_are_let_go() -> None:
    async def main() -> None:
        bench, target = Bench(), bytearray(4)
        bench.expect(PARTS_MAX, 0, [memoryview(target)])
        assert bench.copies.cancel(2 * PARTS_MAX) == []  # another transfer's
        assert bench.copies.cancel(PARTS_MAX) == [(HERE, PARTS_MAX, 0)]
        bench.transmit(PARTS_MAX, 0, [memoryview(bytearray(b"abcd"))])
        assert await bench.wait(1) == [sent(0)]
        assert target == bytes(4)
        bench.copies.close()

    asyncio.run(main())


def test_a_claim_is_taken_back_while_it_waits_but_not_once_a_thread_has_begun() -> None:
    async def main() -> None:
        bench, gate, targets = Bench(), Gate(), [bytearray(4) for _ in range(THREADS + 1)]
        for number, target in enumerate(targets):
            bench.expect(PARTS_MAX, 4 * number, [memoryview(target)])
            bench.transmit(PARTS_MAX, 4 * number, gate)
        for _ in range(THREADS):
            assert await asyncio.to_thread(gate.begun.acquire, timeout=WAIT_S)
        assert bench.copies.cancel(PARTS_MAX) == [(HERE, PARTS_MAX, 4 * THREADS)]
        assert bench.copies.cancel(PARTS_MAX) == []
        assert bench.events == []
        gate.open.set()
        events = await bench.wait(2 * THREADS + 1)
        assert {event for event in events if isinstance(event, out.ChunkSent)} == {
            sent(4 * number) for number in range(THREADS + 1)
        }
        assert targets == [*[b"late"] * THREADS, bytes(4)]
        bench.copies.close()

    asyncio.run(main())


def test_a_copy_that_cannot_be_made_ends_too(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bench = Bench()
        bench.expect(PARTS_MAX, 0, [memoryview(bytearray(3))])
        bench.transmit(PARTS_MAX, 0, [memoryview(bytearray(b"abcd"))])
        assert await bench.wait(2) == [sent(0), out.ChunkMissed(HERE, PARTS_MAX, 0)]
        bench.copies.close()

    asyncio.run(main())
    assert "4 bytes into 3" in caplog.text


def test_closing_waits_for_the_copies_that_are_under_way() -> None:
    """After it nobody touches a pool: the next life may have it."""

    async def main() -> None:
        bench, gate, target = Bench(), Gate(), bytearray(4)
        bench.expect(PARTS_MAX, 0, [memoryview(target)])
        bench.transmit(PARTS_MAX, 0, gate)
        assert await asyncio.to_thread(gate.begun.acquire, timeout=WAIT_S)
        closing = asyncio.create_task(asyncio.to_thread(bench.copies.close))
        done, _ = await asyncio.wait([closing], timeout=0.05)
        assert not done
        gate.open.set()
        await closing
        assert target == b"late"

    asyncio.run(main())
