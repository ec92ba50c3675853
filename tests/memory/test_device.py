"""Device pools with the CPU in a GPU's place: streams and events are nothing, all else is the same."""

import threading
from pathlib import Path

import pytest
import torch

from kvferry_daemon.memory.device import Device, DeviceError, DevicePool
from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.places import SlicePlans, whole
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.parts import SideSlice
from slicing import PlaneKind, layout_of

BLOCKS = 9
RUNS = ((5, 2), (1, 1), (3, 1))  # of a window from token 8 on
LAYOUT = Layout(
    planes=(
        Plane(name="kv", dtype=Dtype.BFLOAT16, shape=(3, 5)),
        Plane(name="heads", dtype=Dtype.UINT8, shape=(3,), order=Order.HND),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    block_size_tokens=4,
)


def device_pool(layout: Layout, told: list[tuple[str, bool]] | None = None) -> DevicePool:
    def on_broken(message: str, usable: bool) -> None:
        assert told is not None, message
        told.append((message, usable))

    return DevicePool.create(Device("cpu"), layout.block_bytes, BLOCKS, on_broken)


def both(layout: Layout, directory: Path) -> tuple[HostPool, DevicePool]:
    """The same bytes in a file and in a device."""
    host, device = HostPool.create(directory / "p", layout.block_bytes, BLOCKS), device_pool(layout)
    made = torch.randint(0, 256, (device.size_bytes,), dtype=torch.uint8)
    host.view(0, BLOCKS)[:] = made.numpy().tobytes()
    device.arena[: device.size_bytes] = made
    return host, device


def bytes_of(pool: DevicePool) -> bytes:
    return pool.arena[: pool.size_bytes].numpy().tobytes()


@pytest.mark.parametrize(("first", "tokens"), [(8, 16), (9, 1), (10, 13), (15, 2), (16, 4), (8, 3)])
def test_whole_extents_are_those_of_a_host_pool(tmp_path: Path, first: int, tokens: int) -> None:
    host, device = both(LAYOUT, tmp_path)
    views = whole(host, LAYOUT, RUNS, 8, first, tokens)
    place = whole(device, LAYOUT, RUNS, 8, first, tokens)
    assert isinstance(views, list)
    assert not isinstance(place, list)
    out = bytearray(place.payload_bytes)
    place.gather(memoryview(out))
    assert out == b"".join(views)
    fresh = bytes(byte ^ 0xFF for byte in out)
    place.scatter(memoryview(bytearray(fresh)))
    at = 0
    for view in views:
        view[:] = fresh[at : at + len(view)]
        at += len(view)
    assert bytes_of(device) == bytes(host.view(0, BLOCKS))  # and no byte beside it


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("kind", [(4, (3,), Dtype.BFLOAT16), (4, (1,)), (5, (3,)), (2, ())])
@pytest.mark.parametrize(("first_head", "heads"), [(0, 1), (1, 1), (0, 2)])
def test_slices_are_those_of_a_host_pool(
    tmp_path: Path, order: Order, kind: tuple[object, ...], first_head: int, heads: int
) -> None:
    """Also of odd sizes, where nothing is a multiple of an item that torch has."""
    layout = layout_of([PlaneKind(*kind), PlaneKind(*kind)], 1, 4, order)  # type: ignore[arg-type]
    host, device = both(layout, tmp_path)
    slices = ((SideSlice(0, first_head, heads), SideSlice(1, first_head, heads)), 2)
    extent = SlicePlans().sliced(host, layout, slices, RUNS, 8, 10, 11)
    place = SlicePlans().sliced(device, layout, slices, RUNS, 8, 10, 11)
    expected, out = bytearray(extent.payload_bytes), bytearray(place.payload_bytes)
    extent.gather(memoryview(expected))
    place.gather(memoryview(out))
    assert out == expected
    fresh = memoryview(bytearray(byte ^ 0xFF for byte in out))
    extent.scatter(fresh)
    place.scatter(fresh)
    assert bytes_of(device) == bytes(host.view(0, BLOCKS))


def test_a_pool_begins_with_zeros_and_its_blocks_are_wiped_alone() -> None:
    pool = device_pool(LAYOUT)
    assert not any(bytes_of(pool))
    pool.arena.fill_(7)
    pool.zero(2, 3)
    size = LAYOUT.block_bytes
    assert bytes_of(pool) == b"\7" * 2 * size + bytes(3 * size) + b"\7" * 4 * size


def test_nothing_outside_of_the_blocks_is_touched() -> None:
    pool = device_pool(LAYOUT)
    assert pool.arena.numel() > pool.size_bytes, "there is padding that a wrong number would reach"
    with pytest.raises(IndexError, match="not in a pool of"):
        pool.zero(BLOCKS - 1, 2)
    with pytest.raises(IndexError, match="not in a pool of"):
        pool.spans([(0, 10), (pool.size_bytes - 1, 2)])
    with pytest.raises(ValueError, match="no such pool"):
        SlicePlans().sliced(pool, LAYOUT, ((SideSlice(0, 0, None),), 4), ((BLOCKS, 1),), 0, 0, 4)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_buffer_of_another_size_is_refused(size: int) -> None:
    pool = device_pool(LAYOUT)
    with pytest.raises(ValueError, match="a chunk of 10 bytes"):
        pool.spans([(0, 10)]).gather(memoryview(bytearray(size)))
    with pytest.raises(ValueError, match="a chunk of 10 bytes"):
        pool.spans([(0, 10)]).scatter(memoryview(bytearray(size)))


def broken_pool(told: list[tuple[str, bool]]) -> DevicePool:
    """One whose memory is gone: torch refuses every copy."""
    pool = device_pool(LAYOUT, told)
    pool.arena.untyped_storage().resize_(0)
    return pool


def test_a_copy_that_fails_is_told_and_raised() -> None:
    told: list[tuple[str, bool]] = []
    pool = broken_pool(told)
    place, buffer = pool.spans([(0, 10)]), memoryview(bytearray(10))
    sliced = SlicePlans().sliced(pool, LAYOUT, ((SideSlice(2, 0, None),), 4), ((0, 1),), 0, 0, 4)
    staged = memoryview(bytearray(sliced.payload_bytes))
    for work in (
        lambda: place.gather(buffer),
        lambda: place.scatter(buffer),
        lambda: sliced.gather(staged),
        lambda: sliced.scatter(staged),
        lambda: pool.zero(0, 1),
    ):
        with pytest.raises(DeviceError, match="a copy on cpu failed: setStorage"):
            work()
        message, usable = told.pop()
        assert "a copy on cpu failed: setStorage" in message
        assert usable, "the device itself still works"
    assert not told


def test_threads_copy_beside_each_other(tmp_path: Path) -> None:
    host, device = both(LAYOUT, tmp_path)
    size = LAYOUT.block_bytes
    found: dict[int, bytes] = {}

    def read(block: int) -> None:
        out = bytearray(size)
        for _ in range(50):
            device.spans([(block * size, size)]).gather(memoryview(out))
        found[block] = bytes(out)

    threads = [threading.Thread(target=read, args=(block,)) for block in range(BLOCKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {block: bytes(host.view(block, 1)) for block in range(BLOCKS)}


def test_buffers_can_be_written_and_have_their_size() -> None:
    buffer = Device("cpu").buffer(100)
    buffer[:] = bytes(range(100))
    assert bytes(buffer) == bytes(range(100))


def test_a_removed_pool_is_of_no_use() -> None:
    pool = device_pool(LAYOUT)
    pool.remove()
    with pytest.raises(AssertionError, match="removed"):
        pool.zero(0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match="cuda:3.* set device=host"):
        Device("cuda:3")


def test_memory_that_cannot_be_had_is_refused_with_the_number() -> None:
    with pytest.raises(DeviceError, match=str(1 << 60)):
        Device("cpu").allocate(1 << 60)
