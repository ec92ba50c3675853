"""Plans of slices are kept for every chunk of their part: each layout's own, and not for ever."""

from pathlib import Path

import pytest

from kvferry_daemon.memory import places
from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.places import SlicePlans
from kvferry_proto.layout import Order
from kvferry_proto.parts import SideSlice
from slicing import PlaneKind, layout_of

HALF = ((SideSlice(0, 0, 2),), 4)  # the first two heads of four, in wire blocks of four tokens


def test_layouts_with_the_same_slices_have_plans_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "PLANS_MAX", 2)
    plans = SlicePlans()
    for number in (0, 1, 2, 0, 1, 2):
        kind, order = PlaneKind(4, (1 + number % 2,)), list(Order)[number // 2]
        layout = layout_of([kind], 1, 4, order)
        path = tmp_path / "pool"
        pool = HostPool.create(path, layout.block_bytes, 2)
        extent = plans.sliced(pool, layout, HALF, ((0, 2),), 0, 0, 8)
        assert extent.payload_bytes == 8 * layout.planes[0].token_bytes // 2
        got = bytearray(extent.payload_bytes)
        view = pool.view(0, 2)
        view[:] = bytes(place % 251 for place in range(len(view)))
        extent.gather(memoryview(got))
        fresh = bytearray(len(got))
        SlicePlans().sliced(pool, layout, HALF, ((0, 2),), 0, 0, 8).gather(memoryview(fresh))
        assert got == fresh
        assert len(plans._plans) <= 2
        path.unlink()
