"""SGLang's KV pools as planes.

SGLang hands a backend addresses and lengths; the pools behind them say more: which dtype, how many
heads, and in what order.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from kvferry_client.engine import layout_of
from kvferry_client.paged import CachePlane, PagedCache
from kvferry_client.sglang_supported import check_tried
from kvferry_proto.layout import Layout


class Cache(NamedTuple):
    """One scheduler's share of an engine's cache."""

    layout: Layout
    groups: list[PagedCache]  # full attention, and then what looks back a window only, if any
    page_tokens: int


def cache_of(
    pool: Any, aux: Mapping[str, torch.Tensor], heads_total: int, pool_block_tokens: int
) -> Cache:
    """The layers that travel; ValueError names what cannot be carried.

    ``heads_total``: of keys and values over all ranks. ``aux``: see ``sglang_aux``.
    """
    if type(pool) is SWAKVPool and pool.request_window is None:
        check_tried("layers that look back a window")
        groups = [_planes(pool.full_kv_pool, "full."), _planes(pool.swa_kv_pool, "swa.")]
    else:
        groups = [_planes(pool, "")]
    totals = {
        name: heads_total
        for group in groups
        for name, plane in group.items()
        if plane.tensor.ndim == 4
    }
    layout = layout_of(groups, heads_total=totals, block_size_tokens=pool_block_tokens, aux=[*aux])
    return Cache(layout, [PagedCache(planes) for planes in groups], pool.page_size)


def _planes(pool: Any, prefix: str) -> dict[str, CachePlane]:
    """A pool's buffers, each (slots, ...), as pages."""
    if pool.store_dtype != pool.dtype:
        raise ValueError(f"a KV pool of {pool.dtype}, kept as {pool.store_dtype}, is not carried")
    if type(pool) is MLATokenToKVPool:
        check_tried("latents (MLA)")
        named = {f"{prefix}{i}.latent": one[:, 0] for i, one in enumerate(pool.kv_buffer)}
    elif type(pool) is MHATokenToKVPool and pool.kv_cache_layout == "nhd":
        both = zip(pool.k_buffer, pool.v_buffer, strict=True)
        named = {
            f"{prefix}{i}.{kind}": one
            for i, pair in enumerate(both)
            for kind, one in zip("kv", pair, strict=True)
        }
    else:
        order = getattr(pool, "kv_cache_layout", "")
        raise ValueError(f"a KV pool of {type(pool).__name__} {order} is not carried")
    pages = {}
    for name, one in named.items():
        blocks = one.shape[0] // pool.page_size
        whole = one[: blocks * pool.page_size]
        pages[name] = CachePlane(whole.unflatten(0, (blocks, pool.page_size)))
    return pages
