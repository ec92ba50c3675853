"""Device pools with the CPU in a GPU's place: streams and events are nothing, all else is the same.

Where there is a GPU (``-m gpu``), the same with it.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvferry_daemon.memory.device import Device, DeviceError
from kvferry_daemon.memory.device_pool import DevicePool
from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.places import SlicePlans, whole
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.parts import SideSlice
from slicing import PlaneKind, layout_of

GPU = pytest.mark.gpu
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


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=GPU)])
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


def device_pool(
    device: Device, layout: Layout = LAYOUT, told: list[tuple[str, bool]] | None = None
) -> DevicePool:
    def on_broken(message: str, usable: bool) -> None:
        assert told is not None, message
        told.append((message, usable))

    return DevicePool.create(device, layout.block_bytes, BLOCKS, on_broken)


def both(device: Device, layout: Layout, directory: Path) -> tuple[HostPool, DevicePool]:
    """The same bytes in a file and in a device."""
    host = HostPool.create(directory / "p", layout.block_bytes, BLOCKS)
    pool = device_pool(device, layout)
    made = torch.randint(0, 256, (pool.size_bytes,), dtype=torch.uint8)
    host.view(0, BLOCKS)[:] = made.numpy().tobytes()
    pool.arena[: pool.size_bytes] = made
    return host, pool


def buffer_of(device: Device, content: bytes) -> memoryview:
    """A thread's buffer, holding this."""
    buffer = device.buffer(len(content))
    buffer[:] = content
    return buffer


def bytes_of(pool: DevicePool) -> bytes:
    return pool.arena[: pool.size_bytes].cpu().numpy().tobytes()


@pytest.mark.parametrize(("first", "tokens"), [(8, 16), (9, 1), (10, 13), (15, 2), (16, 4), (8, 3)])
def test_whole_extents_are_those_of_a_host_pool(
    device: Device, tmp_path: Path, first: int, tokens: int
) -> None:
    host, pool = both(device, LAYOUT, tmp_path)
    views = whole(host, LAYOUT, RUNS, 8, first, tokens)
    place = whole(pool, LAYOUT, RUNS, 8, first, tokens)
    assert isinstance(views, list)
    assert not isinstance(place, list)
    out = device.buffer(place.payload_bytes)
    place.gather(out)
    assert bytes(out) == b"".join(views)
    fresh = bytes(byte ^ 0xFF for byte in out)
    place.scatter(buffer_of(device, fresh))
    at = 0
    for view in views:
        view[:] = fresh[at : at + len(view)]
        at += len(view)
    assert bytes_of(pool) == bytes(host.view(0, BLOCKS))  # and no byte beside it


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("kind", [(4, (3,), Dtype.BFLOAT16), (4, (1,)), (5, (3,)), (2, ())])
@pytest.mark.parametrize(("first_head", "heads"), [(0, 1), (1, 1), (0, 2)])
def test_slices_are_those_of_a_host_pool(
    device: Device,
    tmp_path: Path,
    order: Order,
    kind: tuple[object, ...],
    first_head: int,
    heads: int,
) -> None:
    """Also of odd sizes, where nothing is a multiple of an item that torch has."""
    layout = layout_of([PlaneKind(*kind), PlaneKind(*kind)], 1, 4, order)  # type: ignore[arg-type]
    host, pool = both(device, layout, tmp_path)
    slices = ((SideSlice(0, first_head, heads), SideSlice(1, first_head, heads)), 2)
    extent = SlicePlans().sliced(host, layout, slices, RUNS, 8, 10, 11)
    place = SlicePlans().sliced(pool, layout, slices, RUNS, 8, 10, 11)
    expected, out = bytearray(extent.payload_bytes), device.buffer(place.payload_bytes)
    extent.gather(memoryview(expected))
    place.gather(out)
    assert bytes(out) == expected
    fresh = bytes(byte ^ 0xFF for byte in out)
    extent.scatter(memoryview(bytearray(fresh)))
    place.scatter(buffer_of(device, fresh))
    assert bytes_of(pool) == bytes(host.view(0, BLOCKS))


def test_a_pool_begins_with_zeros_and_its_blocks_are_wiped_alone(device: Device) -> None:
    pool = device_pool(device)
    assert not any(bytes_of(pool))
    pool.arena.fill_(7)
    pool.zero(2, 3)
    size = LAYOUT.block_bytes
    assert bytes_of(pool) == b"\7" * 2 * size + bytes(3 * size) + b"\7" * 4 * size


def test_nothing_outside_of_the_blocks_is_touched() -> None:
    pool = device_pool(Device("cpu"))
    assert pool.arena.numel() > pool.size_bytes, "there is padding that a wrong number would reach"
    with pytest.raises(IndexError, match="not in a pool of"):
        pool.zero(BLOCKS - 1, 2)
    with pytest.raises(IndexError, match="not in a pool of"):
        pool.spans([(0, 10), (pool.size_bytes - 1, 2)])
    with pytest.raises(ValueError, match="no such pool"):
        SlicePlans().sliced(pool, LAYOUT, ((SideSlice(0, 0, None),), 4), ((BLOCKS, 1),), 0, 0, 4)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_buffer_of_another_size_is_refused(size: int) -> None:
    pool = device_pool(Device("cpu"))
    with pytest.raises(ValueError, match="a chunk of 10 bytes"):
        pool.spans([(0, 10)]).gather(memoryview(bytearray(size)))
    with pytest.raises(ValueError, match="a chunk of 10 bytes"):
        pool.spans([(0, 10)]).scatter(memoryview(bytearray(size)))


def broken_pool(told: list[tuple[str, bool]]) -> DevicePool:
    """One whose memory is gone: torch refuses every copy."""
    pool = device_pool(Device("cpu"), told=told)
    pool.arena.untyped_storage().resize_(0)
    return pool


def test_a_copy_that_fails_is_told_and_raised() -> None:
    told: list[tuple[str, bool]] = []
    pool = broken_pool(told)
    place, buffer = pool.spans([(0, 10)]), memoryview(bytearray(10))
    sliced = SlicePlans().sliced(pool, LAYOUT, ((SideSlice(2, 0, None),), 4), ((0, 1),), 0, 0, 4)
    staged = memoryview(bytearray(sliced.payload_bytes))
    works: list[Callable[[], None]] = [
        lambda: place.gather(buffer),
        lambda: place.scatter(buffer),
        lambda: sliced.gather(staged),
        lambda: sliced.scatter(staged),
        lambda: pool.zero(0, 1),
    ]
    for work in works:
        with pytest.raises(DeviceError, match="a copy on cpu failed: setStorage"):
            work()
        message, usable = told.pop()
        assert "a copy on cpu failed: setStorage" in message
        assert usable, "the device itself still works"
    assert not told


def test_threads_copy_beside_each_other(device: Device, tmp_path: Path) -> None:
    host, pool = both(device, LAYOUT, tmp_path)
    size = LAYOUT.block_bytes
    found: dict[int, bytes] = {}

    def read(block: int) -> None:
        out = device.buffer(size)
        for _ in range(50):
            pool.spans([(block * size, size)]).gather(out)
        found[block] = bytes(out)

    threads = [threading.Thread(target=read, args=(block,)) for block in range(BLOCKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {block: bytes(host.view(block, 1)) for block in range(BLOCKS)}


def test_buffers_can_be_written_and_have_their_size(device: Device) -> None:
    buffer = buffer_of(device, bytes(range(100)))
    assert bytes(buffer) == bytes(range(100))
    assert device.staged(buffer).is_pinned() == device.is_cuda


@GPU
def test_an_arena_is_an_allocation_of_its_own_that_others_can_open() -> None:
    device = Device("cuda:0")
    pools = [
        device_pool(device),
        device_pool(device, layout_of([PlaneKind(None, (1 << 20,))], 1, 4, Order.NHD)),
    ]
    handles = {pool.memory.handle for pool in pools if pool.memory is not None}
    assert len(handles) == 2
    pools.pop().remove()
    again = device_pool(device)
    assert again.memory is not None


@GPU
def test_a_device_without_so_much_memory_says_how_much_it_has() -> None:
    free, total = torch.cuda.mem_get_info(0)
    with pytest.raises(
        DeviceError, match=f"needs {total} bytes of cuda:0, which has [0-9]+ of {total}"
    ):
        Device("cuda:0").allocate(total)
    assert free < total


@GPU
def test_a_device_beyond_the_last_is_named_with_those_that_are_there() -> None:
    with pytest.raises(DeviceError, match=r"cuda:99 does not exist.*cuda:0"):
        Device("cuda:99")


@GPU
def test_nobody_waits_for_another_streams_work() -> None:
    """A copy ends while a kernel of another thread's stream still runs."""
    device = Device("cuda:0")
    pool = device_pool(device)
    pool.zero(0, BLOCKS)
    buffer = device.buffer(64)  # now: pinning waits for the whole device
    stream, done = torch.cuda.Stream(), torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # about a second
        done.record(stream)
    pool.spans([(0, 64)]).gather(buffer)
    assert not done.query()  # type: ignore[no-untyped-call]
    done.synchronize()


def test_a_removed_pool_is_of_no_use() -> None:
    pool = device_pool(Device("cpu"))
    pool.remove()
    with pytest.raises(AssertionError, match="removed"):
        pool.zero(0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match=r"cuda:3.* set device=host"):
        Device("cuda:3")


def test_memory_that_cannot_be_had_is_refused_with_the_number() -> None:
    with pytest.raises(DeviceError, match=str(1 << 60)):
        Device("cpu").allocate(1 << 60)
