"""Where the bytes of a token extent lie: in views of whole spans, or strided in slices.

Views are of host memory; what lies in a device is copied through a buffer, whole or not.
"""

from collections.abc import Sequence

from kvferry_daemon.memory.device_pool import DevicePool, DeviceSlices, DeviceSpans
from kvferry_daemon.memory.host import HostPool
from kvferry_daemon.memory.slices import SlicedExtent, SlicePlan
from kvferry_daemon.memory.spans import spans
from kvferry_proto.layout import Layout
from kvferry_proto.parts import SideSlice

Pool = HostPool | DevicePool
PLANS_MAX = 1024  # there are as many as parts, for each pair of layouts that meets
Runs = Sequence[tuple[int, int]]  # (first_block, blocks)


def whole(
    pool: Pool, layout: Layout, runs: Runs, base_token: int, first_token: int, tokens: int
) -> list[memoryview] | DeviceSpans:
    """Tokens [first_token, first_token + tokens) of a window: every plane, padding included."""
    parts = spans(
        runs,
        base_token=base_token,
        first_token=first_token,
        tokens=tokens,
        block_size=layout.block_size_tokens,
        block_bytes=layout.block_bytes,
        strips=layout.strips,
    )
    if isinstance(pool, DevicePool):
        return pool.spans(parts)
    return [pool.piece(offset, length) for offset, length in parts]


class SlicePlans:
    """A plan is needed again for every chunk of its part."""

    def __init__(self) -> None:
        self._plans: dict[tuple[bytes, tuple[SideSlice, ...], int], SlicePlan] = {}

    def sliced(
        self,
        pool: Pool,
        layout: Layout,
        slices: tuple[tuple[SideSlice, ...], int],
        runs: Runs,
        base_token: int,
        first_token: int,
        tokens: int,
    ) -> SlicedExtent | DeviceSlices:
        """The same tokens, of these slices; ``slices`` comes with the tokens of a wire block."""
        key = (layout.digest, *slices)
        if key not in self._plans:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            self._plans[key] = SlicePlan(layout, *slices)
        plan = self._plans[key]
        if isinstance(pool, DevicePool):
            areas = plan.areas(pool.size_bytes, runs, base_token, first_token, tokens)
            return DeviceSlices(pool, plan, areas, tokens)
        return plan.extent(
            pool.view(0, pool.blocks),
            runs,
            base_token=base_token,
            first_token=first_token,
            tokens=tokens,
        )
