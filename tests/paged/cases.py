"""Caches, pools and windows of any shape, and what a copy has to make of them, token by token."""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from kvferry_client.paged import CachePlane, HeadSlice, PagedCache, PagedCopy, PagedPool
from kvferry_client.views import Pool, WindowView, runs_of
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.worker import PoolInfo

# How engines put planes into a tensor: alone, the keys before the values of all blocks, of each
# block, of each head; and a tensor whose rows begin anywhere.
FORMS: dict[str, tuple[Callable[[list[int]], list[int]], Callable[[Any], Any]]] = {
    "alone": (lambda lies: lies, lambda tensor: tensor),
    "of all blocks": (lambda lies: [2, *lies], lambda tensor: tensor[1]),
    "of a block": (lambda lies: [lies[0], 2, *lies[1:]], lambda tensor: tensor[:, 1]),
    "of a head": (lambda lies: [*lies[:-1], 2 * lies[-1]], lambda tensor: tensor.chunk(2, -1)[1]),
    "askew": (lambda lies: [*lies[:-1], lies[-1] + 3], lambda tensor: tensor[..., 1:-2]),
}


class Cached(NamedTuple):
    """A plane of a cache, in a tensor of which it is a view."""

    name: str
    order: Order
    form: str
    heads: int | None  # None: as many as the layout's plane has
    whole: torch.Tensor

    @property
    def plane(self) -> CachePlane:
        return CachePlane(FORMS[self.form][1](self.whole), self.order)


class Case(NamedTuple):
    """A copy: ``tokens`` from ``first`` on, between a cache and a window."""

    layout: Layout
    cached: list[Cached]
    blocks: torch.Tensor  # of the pool
    window: WindowView
    table: list[int]
    first: int
    tokens: int
    heads: HeadSlice | None

    @property
    def cache(self) -> PagedCache:
        return PagedCache({one.name: one.plane for one in self.cached})

    @property
    def paged_pool(self) -> PagedPool:
        return PagedPool(self.blocks, self.layout)

    @property
    def where(self) -> tuple[list[int], WindowView, int, int]:
        """What a copy is asked for."""
        return self.table, self.window, self.first, self.tokens

    def put_aside(self, device: str) -> "Case":
        """The same in other memory, maybe of another device."""
        cached = [one._replace(whole=one.whole.to(device, copy=True)) for one in self.cached]
        return self._replace(cached=cached, blocks=self.blocks.to(device, copy=True))

    def copy(self) -> PagedCopy:
        return PagedCopy(self.cache, self.paged_pool, self.heads)

    def memory(self) -> list[bytes]:
        """Every byte of both sides: the pool's, then each tensor's."""
        wholes = [one.whole for one in self.cached]
        return [bytes_of(tensor) for tensor in (self.blocks, *wholes)]

    def expected(self, *, to_pool: bool) -> list[bytes]:
        """What ``memory`` is after the copy. Changes nothing."""
        pool = self.blocks.clone()
        cached = [one._replace(whole=one.whole.clone()) for one in self.cached]
        planes = {plane.name: plane for plane in self.layout.planes}
        for one in cached:
            plane = planes[one.name]
            for token in range(self.first, self.first + self.tokens):
                there = self._in_cache(one, plane, token)
                here = self._in_pool(pool, plane, token)
                if to_pool:
                    here.copy_(there)
                else:
                    there.copy_(here)
        return [bytes_of(tensor) for tensor in (pool, *(one.whole for one in cached))]

    def _in_cache(self, one: Cached, plane: Plane, token: int) -> torch.Tensor:
        tensor, order = one.plane
        size = tensor.shape[2 if order is Order.HND else 1]
        block, slot = self.table[token // size], token % size
        there = tensor[block, :, slot] if order is Order.HND else tensor[block, slot]
        if self.heads is None or plane.heads_total is None:
            return there
        return there[self.heads.cache_first :][: self.heads.heads]

    def _in_pool(self, pool: torch.Tensor, plane: Plane, token: int) -> torch.Tensor:
        size = self.layout.block_size_tokens
        base = self.window.runs[0].first_token
        blocks = [first + at for _, first, count in self.window.runs for at in range(count)]
        block, slot = blocks[(token - base) // size], (token - base) % size
        at = self.layout.places[self.layout.planes.index(plane)].offset_bytes
        there = pool[block, at : at + plane.token_bytes * size].view(getattr(torch, plane.dtype))
        if plane.order is Order.HND:
            lies = there.view(plane.shape[0], size, *plane.shape[1:])[:, slot]
        else:
            lies = there.view(size, *plane.shape)[slot]
        if self.heads is None or plane.heads_total is None:
            return lies
        return lies[self.heads.pool_first :][: self.heads.heads]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def noise(shape: list[int], dtype: Dtype) -> torch.Tensor:
    """A tensor of random bytes."""
    chance = torch.Generator().manual_seed(sum(shape))
    raw = torch.randint(0, 256, (*shape, dtype.element_bytes), dtype=torch.uint8, generator=chance)
    return raw.view(getattr(torch, dtype)).squeeze(-1)


def cached(
    plane: Plane, blocks: int, size: int, order: Order, form: str, heads: int | None = None
) -> Cached:
    """A plane of a cache that has the plane's shape, but maybe more or fewer heads."""
    shape = list(plane.shape)
    if heads is not None:
        shape[0] = heads
    if not shape:
        order = Order.NHD
    lies = [shape[0], size, *shape[1:]] if order is Order.HND else [size, *shape]
    whole = noise(FORMS[form][0]([blocks, *lies]), plane.dtype)
    return Cached(plane.name, order, form, heads, whole)


def pool_of(layout: Layout, blocks: int) -> Pool:
    """A pool full of random bytes, in a file that has no name any more."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        chance = np.random.default_rng(blocks)
        file.write(chance.bytes(blocks * layout.block_bytes))
        file.flush()
        info = PoolInfo(
            path=file.name, blocks=blocks, block_bytes=layout.block_bytes, window_tokens=1
        )
        return Pool(info, layout)


def case_of(
    layout: Layout,
    cached: list[Cached],
    *,
    runs: list[tuple[int, int]],
    table: list[int],
    first: int,
    tokens: int,
    heads: HeadSlice | None = None,
    ahead: int = 0,
) -> Case:
    """A window whose first ``ahead`` blocks are not copied, in a pool a block larger than it."""
    pool = pool_of(layout, max(first_block + count for first_block, count in runs) + 1)
    size = layout.block_size_tokens
    placed = runs_of((first // size - ahead) * size, size, runs)
    begin = placed[0].first_token if ahead else first
    end = placed[-1].first_token + placed[-1].blocks * size
    window = WindowView(pool, begin, end - begin, placed)
    return Case(layout, cached, pool.torch_blocks(), window, table, first, tokens, heads)


SHAPES = [(), (1,), (6,), (3, 1), (2, 5), (4, 8), (2, 2, 3), (4, 64), (1, 576)]
DTYPES = [Dtype.UINT8, Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.INT64, Dtype.FLOAT8_E4M3FN]


@st.composite
def planes(draw: st.DrawFn, index: int) -> Plane:
    shape = draw(st.sampled_from(SHAPES))
    has_heads = len(shape) > 1 and draw(st.booleans())
    return Plane(
        name=f"p{index}",
        dtype=draw(st.sampled_from(DTYPES)),
        shape=shape,
        heads_total=4 * shape[0] if has_heads else None,
        order=draw(st.sampled_from(Order)) if shape else Order.NHD,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any copy that both sides allow."""
    size, cache_size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    count = draw(st.integers(1, 3))
    layout = Layout(
        planes=tuple(draw(planes(index)) for index in range(count)), block_size_tokens=size
    )
    first, tokens = draw(st.integers(0, 20)), draw(st.integers(1, 40))
    needed = -(-(first + tokens) // cache_size)
    blocks = needed + draw(st.integers(0, 3))
    table = draw(st.permutations(range(blocks)))[:needed]
    heads = _slice(draw, layout)
    ahead = draw(st.integers(0, min(2, first // size)))
    some = draw(st.lists(st.sampled_from(layout.planes), min_size=1, unique_by=lambda p: p.name))
    if heads is not None and all(plane.heads_total is None for plane in some):
        heads = None
    return case_of(
        layout,
        [_cached(draw, plane, blocks, cache_size, heads) for plane in some],
        runs=_runs(draw, -(-(first + tokens) // size) - first // size + ahead),
        table=table,
        first=first,
        tokens=tokens,
        heads=heads,
        ahead=ahead,
    )


def _cached(
    draw: st.DrawFn, plane: Plane, blocks: int, size: int, heads: HeadSlice | None
) -> Cached:
    inner = len(plane.shape) > 2  # then a head's row is in one piece only if all of it is there
    forms = [form for form in FORMS if not (inner and form in ("of a head", "askew"))]
    order, form = draw(st.sampled_from(Order)), draw(st.sampled_from(forms))
    have = None
    if heads is not None and plane.heads_total is not None:
        have = heads.cache_first + heads.heads + draw(st.integers(0, 2))
    return cached(plane, blocks, size, order, form, have)


def _slice(draw: st.DrawFn, layout: Layout) -> HeadSlice | None:
    """One that fits every plane with heads."""
    counts = [plane.shape[0] for plane in layout.planes if plane.heads_total is not None]
    if not counts or draw(st.booleans()):
        return None
    heads = draw(st.integers(1, min(counts)))
    return HeadSlice(draw(st.integers(0, 3)), draw(st.integers(0, min(counts) - heads)), heads)


def _runs(draw: st.DrawFn, blocks: int) -> list[tuple[int, int]]:
    """Runs of so many blocks and maybe one more, in any order."""
    left, at = blocks + draw(st.integers(0, 1)), 0
    runs: list[tuple[int, int]] = []
    while left:
        at += draw(st.integers(0, 1))
        count = draw(st.integers(1, left))
        runs.append((at, count))
        at, left = at + count, left - count
    return draw(st.permutations(runs))
