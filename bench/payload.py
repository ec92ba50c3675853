"""Payloads of Llama-3-8B's shape whose every word tells the block it belongs to."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from bench.wire import Words, mapped
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.worker import PoolInfo

LAYERS = 32
HEADS = 8
HEAD_SIZE = 128


def llama(heads: int = HEADS, block_size_tokens: int = 128, layers: int = LAYERS) -> Layout:
    """Llama-3-8B's KV cache: 128 KiB a token, in bfloat16. Fewer heads: a rank's share of it."""
    planes = tuple(
        Plane(name=f"layer.{layer}.{part}", dtype=Dtype.BFLOAT16, shape=(heads, HEAD_SIZE))
        for layer in range(layers)
        for part in "kv"
    )
    return Layout(planes=planes, block_size_tokens=block_size_tokens)


class Payload:
    """A daemon's pool, filled and looked at block by block.

    Block ``number`` of a payload holds the same random words as all, plus its number in each: so
    a word that is missing, stale, moved or of another block is seen.
    """

    def __init__(self, pool: PoolInfo, layout: Layout) -> None:
        self._blocks: Words = mapped(pool)
        words = self._blocks.shape[1]
        generator = np.random.default_rng(5)
        self._base: Words = np.asarray(generator.integers(0, 1 << 62, words, dtype=np.uint64))
        self._scratch: Words = np.empty_like(self._base)
        self._step = max(1, words // len(layout.planes))

    def fill(self, numbered: Iterable[tuple[int, int]]) -> None:
        """Write (number, block) each."""
        for number, block in numbered:
            np.add(self._base, np.uint64(number), out=self._blocks[block])

    def check(self, numbered: Iterable[tuple[int, int]]) -> None:
        """Every word of (number, block) each is right."""
        for number, block in numbered:
            np.subtract(self._blocks[block], np.uint64(number), out=self._scratch)
            assert np.array_equal(self._scratch, self._base), f"block {number} is not what was sent"

    def check_planes(self, planes: NDArray[np.uint16], layout: Layout) -> None:
        """Arrays of (tokens, *shape), one a plane, hold a payload's tokens from its first on."""
        size = layout.block_size_tokens
        for index, plane in enumerate(planes):
            part = self._base[index * self._step : (index + 1) * self._step]
            rows = np.ascontiguousarray(plane).view(np.uint64).reshape(len(plane) // size, -1)
            for number, row in enumerate(rows):
                assert np.array_equal(row, part + np.uint64(number)), f"plane {index} is wrong"

    def glance(self, numbered: Iterable[tuple[int, int]]) -> None:
        """A word of every plane is right: cheap enough for rounds that are timed."""
        for number, block in numbered:
            got = self._blocks[block, :: self._step] - np.uint64(number)
            assert np.array_equal(got, self._base[:: self._step]), f"block {number} is wrong"


def numbered(
    runs: Iterable[tuple[int, int]], base_tokens: int, layout: Layout, first_number: int = 0
) -> list[tuple[int, int]]:
    """(number, block) of a window's blocks; a payload's blocks are numbered from ``first_number``."""
    number = first_number + base_tokens // layout.block_size_tokens
    blocks = [block for first, count in runs for block in range(first, first + count)]
    return list(enumerate(blocks, number))
