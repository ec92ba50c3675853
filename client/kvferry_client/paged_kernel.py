"""The copy between a paged cache and a pool as one Triton kernel for all planes.

Every plane is cut into *strips*: rows of at most ``_WORDS_MAX`` words that one program copies for a
tile of tokens. A table on the device says where each strip lies, by address and strides, so the
planes of an engine may be any views of any tensors. Needs torch and triton.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kvferry_client.paged_rows import Move, Rows

_WORDS_MAX = 512  # of a strip
_TILE_WORDS = 2048  # of a program: 16 KiB, as a rule
_PADDING_MAX = 1.125  # words that a strip's tile has over those of its row
_FIELDS = tl.constexpr(8)  # of a strip in the table


class _Strip(NamedTuple):
    """A row of the table, in bytes and words of ``1 << min(align, 3)`` bytes."""

    cache_address: int
    cache_block_bytes: int
    cache_token_bytes: int
    pool_address: int
    pool_block_bytes: int
    pool_token_bytes: int
    words: int
    align: int  # what all of the above is a multiple of is ``1 << align`` bytes


class TritonCopier:
    """One launch a copy, queued on the current stream of the tensors' device."""

    def __init__(self, planes: Sequence[Rows]) -> None:
        self._planes = list(planes)  # the table holds their addresses: keep them alive
        self._device = planes[0].cache.device
        self._sizes = [side.shape[1] for side in planes[0]]
        self._tile_words = _tile_words([_row_words(rows) for rows in planes])
        strips = [strip for rows in planes for strip in _strips(rows, self._tile_words)]
        self._aligns = sum(1 << align for align in {strip.align for strip in strips})
        self._strips = len(strips)
        self._table = torch.tensor(strips, dtype=torch.int64).to(self._device)

    def copy(self, move: Move, *, to_pool: bool) -> None:
        """Copy a move's tokens of all planes: from the cache to the pool, or the other way."""
        tile_tokens = _TILE_WORDS // self._tile_words
        blocks = torch.from_numpy(np.concatenate((move.cache_blocks, move.pool_blocks)))
        is_cuda = self._device.type == "cuda"
        if is_cuda:  # from other memory, sending it would wait for what the stream does now
            blocks = blocks.pin_memory().to(self._device, non_blocking=True)
        with torch.cuda.device(self._device) if is_cuda else nullcontext():
            _copy[(-(-move.tokens // tile_tokens) * self._strips,)](
                self._table,
                self._strips,
                blocks,
                len(move.cache_blocks),
                move.tokens,
                move.cache_skip,
                move.pool_skip,
                TO_POOL=to_pool,
                CACHE_BLOCK=self._sizes[0],
                POOL_BLOCK=self._sizes[1],
                ALIGNS=self._aligns,
                TILE_TOKENS=tile_tokens,
                TILE_WORDS=self._tile_words,
            )


def _row_words(rows: Rows) -> int:
    return int(rows.cache.shape[-1]) // min(rows.align_bytes, 8)


def _tile_words(rows_words: Sequence[int]) -> int:
    """The longest tile of a power of two that is mostly full; 2 at least, one load of 16 bytes."""
    words, most = _WORDS_MAX, _PADDING_MAX * sum(rows_words)
    while words > 2 and sum(-(-row // words) * words for row in rows_words) > most:
        words //= 2
    return words


def _strips(rows: Rows, tile_words: int) -> Iterator[_Strip]:
    """Cut a plane: a strip a head, or as many as its rows are tiles long."""
    align_bytes, row_words = rows.align_bytes, _row_words(rows)
    addresses, word_bytes = [side.data_ptr() for side in rows], min(align_bytes, 8)
    for strip in range(rows.cache.shape[2]):
        for first in range(0, row_words, tile_words):
            cache, pool = (
                (
                    address + strip * side.stride(2) + first * word_bytes,
                    side.stride(0),
                    side.stride(1),
                )
                for side, address in zip(rows, addresses, strict=True)
            )
            words = min(tile_words, row_words - first)
            yield _Strip(*cache, *pool, words, align_bytes.bit_length() - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(addresses: tl.tensor, ALIGN: tl.constexpr, WORDS: tl.constexpr) -> tl.tensor:
    """Pointers to the words of rows that begin at addresses, (tokens, words)."""
    word: tl.constexpr = (
        tl.int64 if ALIGN >= 3 else tl.int32 if ALIGN == 2 else tl.int16 if ALIGN == 1 else tl.int8
    )
    # The hint makes 16 bytes one load; on the integers it would be lost with the cast.
    pointers = tl.multiple_of(addresses.to(tl.pointer_type(word)), 1 << ALIGN)
    return pointers[:, None] + tl.arange(0, WORDS)[None, :]


@triton.jit(do_not_specialize=["strips", "cache_entries", "tokens", "cache_skip", "pool_skip"])  # type: ignore[untyped-decorator]
def _copy(
    table: tl.tensor,
    strips: tl.tensor,
    blocks: tl.tensor,
    cache_entries: tl.tensor,
    tokens: tl.tensor,
    cache_skip: tl.tensor,
    pool_skip: tl.tensor,
    TO_POOL: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    POOL_BLOCK: tl.constexpr,
    ALIGNS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
) -> None:
    """One strip of one tile of tokens. ``blocks``: those of the cache, then those of the pool."""
    program = tl.program_id(0)
    strip = table + program % strips * _FIELDS
    token = program // strips * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    here = token < tokens
    in_cache = cache_skip + token
    in_pool = pool_skip + token
    cache_block = tl.load(blocks + in_cache // CACHE_BLOCK, mask=here, other=0)
    pool_block = tl.load(blocks + cache_entries + in_pool // POOL_BLOCK, mask=here, other=0)
    cache_at = tl.load(strip) + cache_block * tl.load(strip + 1)
    cache_at += in_cache % CACHE_BLOCK * tl.load(strip + 2)
    pool_at = tl.load(strip + 3) + pool_block * tl.load(strip + 4)
    pool_at += in_pool % POOL_BLOCK * tl.load(strip + 5)
    words = tl.load(strip + 6)
    align = tl.load(strip + 7)
    for ALIGN in tl.static_range(5):
        if ALIGNS >> ALIGN & 1:  # noqa: SIM102  this one is decided when it is compiled
            if align == ALIGN:
                full = tl.multiple_of(words, 2) if ALIGN == 4 else words
                mask = here[:, None] & (tl.arange(0, TILE_WORDS) < full)[None, :]
                cache = _rows(cache_at, ALIGN, TILE_WORDS)
                pool = _rows(pool_at, ALIGN, TILE_WORDS)
                if TO_POOL:
                    tl.store(pool, tl.load(cache, mask=mask), mask=mask)
                else:
                    tl.store(cache, tl.load(pool, mask=mask), mask=mask)
