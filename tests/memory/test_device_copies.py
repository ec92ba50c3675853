"""Copies between two pools of one device, which stay in it. The CPU is in a GPU's place."""

import pytest
import torch

from kvferry_daemon.copies import copy
from kvferry_daemon.memory.device import Device, DeviceError
from kvferry_daemon.memory.device_pool import DevicePool
from kvferry_daemon.memory.places import SlicePlans, whole
from kvferry_daemon.transports.tcp.staging import Sliced, Staging
from kvferry_proto.layout import Dtype, Order
from kvferry_proto.parts import SideSlice
from slicing import PlaneKind, layout_of

BLOCKS, BLOCK = 9, 4
KINDS = [PlaneKind(2, (16,)), PlaneKind(2, (32,), Dtype.BFLOAT16)]  # no padding in a block
LAYOUTS = {order: layout_of(KINDS, 1, BLOCK, order) for order in Order}
SLICES = (SideSlice(0, 0, 2), SideSlice(1, 0, 2))  # all of a block
HERE, THERE = ((5, 2), (1, 1), (3, 1)), ((0, 1), (6, 3))  # the same tokens in two pools
Runs = tuple[tuple[int, int], ...]


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


def a_pool(device: Device, told: list[DevicePool] | None = None) -> DevicePool:
    """Random bytes; ``told`` gets it if it breaks."""

    def on_broken(message: str, usable: bool) -> None:
        assert told is not None, message
        assert usable
        told.append(pool)

    pool = DevicePool.create(device, LAYOUTS[Order.NHD].block_bytes, BLOCKS, on_broken)
    pool.arena.copy_(torch.randint(0, 256, pool.arena.shape, dtype=torch.uint8))
    return pool


def place(pool: DevicePool, kind: str, runs: Runs) -> Sliced:
    """16 tokens of it: as whole blocks, or as slices of an order."""
    if kind == "whole":
        found = whole(pool, LAYOUTS[Order.NHD], runs, 0, 0, 4 * BLOCK)
        assert not isinstance(found, list)
        return found
    layout = LAYOUTS[Order(kind)]
    return SlicePlans().sliced(pool, layout, (SLICES, BLOCK), runs, 0, 0, 4 * BLOCK)


def no_buffer(size_bytes: int) -> memoryview:
    raise AssertionError(f"{size_bytes} bytes went by way of the host")


def bytes_of(pool: DevicePool) -> bytes:
    return pool.arena.cpu().numpy().tobytes()


@pytest.mark.parametrize("source_is", ["whole", "NHD", "HND"])
@pytest.mark.parametrize("sink_is", ["whole", "NHD", "HND"])
def test_it_brings_what_a_copy_by_way_of_the_host_does(
    device: Device, source_is: str, sink_is: str
) -> None:
    source, sink, expected = (a_pool(device) for _ in range(3))
    before = bytes_of(source)
    expected.arena.copy_(sink.arena)
    by_way = place(source, source_is, HERE)
    buffer = device.buffer(by_way.payload_bytes)
    by_way.gather(buffer)
    place(expected, sink_is, THERE).scatter(buffer)
    copy(place(source, source_is, HERE), place(sink, sink_is, THERE), Staging(no_buffer))
    assert bytes_of(sink) == bytes_of(expected)
    assert bytes_of(source) == before
    assert bytes_of(sink) != before


@pytest.mark.parametrize("kind", ["whole", "HND"])
@pytest.mark.parametrize("broken", [0, 1], ids=["source", "sink"])
def test_the_pool_that_fails_is_the_one_that_is_told(kind: str, broken: int) -> None:
    told: list[DevicePool] = []
    pools = [a_pool(Device("cpu"), told)]
    pools.append(a_pool(pools[0].device, told))
    places = place(pools[0], kind, HERE), place(pools[1], kind, THERE)
    pools[broken].arena.untyped_storage().resize_(0)
    with pytest.raises(DeviceError, match="a copy on cpu failed"):
        copy(*places, Staging(no_buffer))
    assert told == [pools[broken]]


def test_pools_of_two_devices_go_by_way_of_the_host() -> None:
    """A daemon has one; each numbers streams of its own."""
    source, sink = a_pool(Device("cpu")), a_pool(Device("cpu"))
    with pytest.raises(AssertionError, match="by way of the host"):
        copy(place(source, "whole", HERE), place(sink, "whole", THERE), Staging(no_buffer))
