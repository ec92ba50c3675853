"""Caches of transformers, sent and received: bytes of every plane, never tensor objects.

    layout = layout_of(model.config)                         # on both sides
    with connect(runtime_dir, layout) as client:
        send_cache(client, "request-1", cache)               # the prefill side
        cache, aux = receive_cache(client, "request-1", source, model.config)  # the decode side

``CacheSending`` sends a cache while a prefill in chunks makes it grow. Taken are DynamicCache and
StaticCache of batch 1, in any pairing, whose layers are full, sliding (chunked, too) or shared;
MLA's latents among them. Others are refused with ``bad_cache`` before anything moves, and what
differs from the layout with ``layout_mismatch``.

Every plane has all tokens on the wire. Of a sliding layer only the last count, as its planes'
names say (``layer.0.k.last4095``): those that the source no longer has are sent as zeros, and the
sink lets them lie. Both sides work window by window; beside the result the sink holds one layer
more while it puts the layers together.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict, Unpack

import torch
from torch import Tensor

from kvferry_client.sync import Client, Sending
from kvferry_client.transformers_layers import (
    Named,
    check_fits,
    filled,
    held,
    names_of,
    planes_of,
    tokens_of,
)
from kvferry_client.views import WindowView
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout, Plane

__all__ = [
    "CacheSending",
    "Received",
    "arrays_of",
    "cache_of",
    "layout_of",
    "receive_cache",
    "send_cache",
]


class CacheOptions(TypedDict, total=False):
    """As of ``Client.send`` and ``Client.receive``."""

    attempt: int
    window_tokens: int | None
    stall_s: float | None


class Received(NamedTuple):
    """A cache, ready to go on with, and the transfer's aux values."""

    cache: Any  # a DynamicCache or StaticCache
    aux: dict[str, Any] | None


def layout_of(
    config: Any,
    dtype: torch.dtype | None = None,
    *,
    block_size_tokens: int = 128,
    aux: tuple[str, ...] = (),
) -> Layout:
    """The layout of a model's cache, from its config; ``dtype`` is the config's or torch's default.

    FerryError(bad_cache) for a model whose cache is not taken.
    """
    planes = tuple(planes_of(config, dtype))
    return Layout(planes=planes, aux=aux, block_size_tokens=block_size_tokens)


def arrays_of(cache: Any, layout: Layout, first_token: int, end_token: int) -> dict[str, Tensor]:
    """Tokens of a cache as the planes have them, (tokens, heads, dim).

    No copy, but for what a sliding layer has no more: zeros. FerryError if the layout is another's.
    """
    check_fits(cache, layout)
    arrays = {}
    for plane, name in zip(layout.planes, names_of(layout), strict=True):
        first, rows = held(cache.layers[name.layer], name.part)
        part = rows[max(first_token - first, 0) : max(end_token - first, 0)]
        lost = end_token - first_token - len(part)
        arrays[plane.name] = torch.cat([part.new_zeros(lost, *plane.shape), part]) if lost else part
    return arrays


def cache_of(config: Any, arrays: Mapping[str, Tensor], max_cache_len: int | None = None) -> Any:
    """A cache from all tokens of every plane, (tokens, heads, dim); static if it has a length."""
    tokens = len(next(iter(arrays.values())))
    parts = {}
    for plane, array in arrays.items():
        layer, part, last = Named.of(plane)
        first = 0 if last is None else max(tokens - last, 0)
        parts[layer, part] = array[first:].transpose(0, 1)
    return filled(config, max_cache_len, tokens, lambda layer, part: parts[layer, part])


class CacheSending:
    """A cache on its way while it grows: ``add`` after every chunk of a prefill.

    Leaving its block finishes it, an exception aborts it. What was added may be changed again.
    """

    def __init__(
        self,
        client: Client,
        transfer_id: str,
        cache: Any,
        *,
        total_tokens: int | None = None,
        **options: Unpack[CacheOptions],
    ) -> None:
        """Open it, with an empty cache or one that has tokens."""
        self._pool = client.pool
        self._cache = cache
        if tokens_of(cache):
            check_fits(cache, self._pool.layout)
        self.sending = client.send(transfer_id, total_tokens=total_tokens, **options)

    def __enter__(self) -> Self:
        self.sending.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sending.__exit__(kind, error, trace)

    def add(self, aux: dict[str, Any] | None = None) -> None:
        """Copy what is new into the pool, waiting for room; ``aux`` with the last ones, or
        behind them where no total was told.

        FerryError(layout_mismatch) or FerryError(bad_cache) if the cache has become another.
        """
        end = tokens_of(self._cache)
        first = self.sending.snapshot.available_tokens
        if end < first:
            raise FerryError(Code.BAD_CACHE, f"{first} tokens were sent, and it has {end} now")
        if first == end and aux is not None:
            self.sending.ready(end, aux=aux)
        while first < end:
            stop = min(end, first + self._pool.info.window_tokens)
            arrays = arrays_of(self._cache, self._pool.layout, first, stop)
            if self._pool.info.device is None:  # what lies in a GPU is fetched piece by piece
                arrays = {name: array.cpu() for name, array in arrays.items()}
            self.sending.fill(first, arrays, aux if stop == end else None)
            first = stop


def send_cache(
    client: Client,
    transfer_id: str,
    cache: Any,
    *,
    aux: dict[str, Any] | None = None,
    **options: Unpack[CacheOptions],
) -> Sending:
    """Copy a whole cache into the pool, window by window as the sink takes it over.

    It may be changed once this returns; ``wait`` on what is returned tells how it ended.
    """
    tokens = tokens_of(cache)
    if not tokens:
        raise FerryError(Code.BAD_CACHE, "the cache has no token")
    with CacheSending(client, transfer_id, cache, total_tokens=tokens, **options) as all_of_it:
        all_of_it.add(aux)
    return all_of_it.sending


def receive_cache(
    client: Client,
    transfer_id: str,
    source: str | None,
    config: Any,
    *,
    max_cache_len: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Unpack[CacheOptions],
) -> Received:
    """Receive a cache from the daemon at ``source``; a static one if ``max_cache_len`` is given.

    FerryError(layout_mismatch) if the client's layout is not this config's; FerryError(bad_cache)
    if the static cache is too small.
    """
    layout = client.pool.layout
    wanted = layout_of(config, dtype, block_size_tokens=layout.block_size_tokens, aux=layout.aux)
    difference = layout.first_difference(wanted)
    if difference is not None:
        raise FerryError(Code.LAYOUT_MISMATCH, f"the layout and the config differ: {difference}")
    to = torch.device(device)
    staged = client.pool.info.device is None and to.type != "cpu"
    rows = {
        (n.layer, n.part): _Rows(p, n, to, staged)
        for p, n in zip(layout.planes, names_of(layout), strict=True)
    }
    with client.receive(transfer_id, source=source, **options) as receiving:
        for window in receiving:
            tokens = max(window.end_token, receiving.total_tokens or 0)
            if max_cache_len is not None and tokens > max_cache_len:
                raise FerryError(
                    Code.BAD_CACHE, f"{tokens} tokens or more, and room for {max_cache_len}"
                )
            for one in rows.values():
                one.take(window, receiving.total_tokens)
    tokens = receiving.total_tokens or 0
    cache = filled(config, max_cache_len, tokens, lambda *key: rows.pop(key).whole())
    return Received(cache, receiving.aux)


class _Rows:
    """One plane's tokens as they come, without those that a sliding layer will not look at."""

    def __init__(self, plane: Plane, name: Named, device: torch.device, staged: bool) -> None:
        """``staged``: the device cannot be reached from the pool's memory directly."""
        self._plane = plane
        self._staged = staged
        self._last_tokens = name.last_tokens
        self._device = device
        self._parts: list[Tensor] = []  # (heads, room, dim) each; only the newest is not full
        self._used = 0  # of the newest's room

    def take(self, window: WindowView, total: int | None) -> None:
        """Copy what is needed of a window. Once the total is known, the rest gets its one place."""
        first, end = window.first_token, window.end_token
        if self._last_tokens is not None:
            first = max(first, (total or end) - self._last_tokens)
        if first >= end:
            return
        if not self._parts or self._used == self._parts[-1].shape[1]:
            heads, dim = self._plane.shape
            room = (total or end) - first
            dtype = getattr(torch, self._plane.dtype.value)
            self._parts.append(torch.empty(heads, room, dim, dtype=dtype, device=self._device))
            self._used = 0
        place = self._parts[-1][:, self._used : self._used + end - first].transpose(0, 1)
        self._used += end - first
        self._forget()
        part = window.part(first, end)
        if self._staged:
            place.copy_(part.gather(self._plane.name, torch.empty(place.shape, dtype=place.dtype)))
        else:
            part.gather(self._plane.name, place)

    def _forget(self) -> None:
        """Drop the oldest parts if the newer ones have all that is needed."""
        if self._last_tokens is None:
            return
        rows = self._used + sum(part.shape[1] for part in self._parts[:-1])
        while len(self._parts) > 1 and rows - self._parts[0].shape[1] >= self._last_tokens:
            rows -= self._parts.pop(0).shape[1]

    def whole(self) -> Tensor:
        """(heads, rows, dim), copied only if the total came late."""
        rows = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
        if self._last_tokens is None:
            return rows
        return rows[:, max(rows.shape[1] - self._last_tokens, 0) :]
