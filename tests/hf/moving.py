"""Moving a cache between two daemons, both workers in this process."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from hf.models import MAX_CACHE_LEN, config_of, new_cache
from kvferry_client import connect
from kvferry_client.transformers_cache import layout_of, receive_cache, send_cache
from live import LiveDaemon

BLOCK_TOKENS = 16
AUX = ("first_token",)
Daemons = tuple[LiveDaemon, LiveDaemon]  # a source's and a sink's


def layout(config: Any, dtype: Any = None) -> Any:
    return layout_of(config, dtype, block_size_tokens=BLOCK_TOKENS, aux=AUX)


@contextmanager
def receiving(daemons: Daemons, name: str, config: Any, **options: Any) -> Iterator[Any]:
    """A client of the source, and a cache that is being received meanwhile."""
    source, sink = daemons
    with ExitStack() as stack:
        ours = stack.enter_context(connect(source.directory, layout(config)))
        theirs = stack.enter_context(connect(sink.directory, layout(config)))
        threads = stack.enter_context(ThreadPoolExecutor(1))
        yield ours, threads.submit(receive_cache, theirs, name, source.address, config, **options)


def moved(daemons: Daemons, name: str, cache: Any, config: Any, token: int, **options: Any) -> Any:
    """What arrives of a cache."""
    with receiving(daemons, name, config, **options) as (client, arriving):
        sending = send_cache(client, name, cache, aux={"first_token": token})
        received = arriving.result(60)
        sending.wait(20)
    assert received.aux == {"first_token": token}
    return received.cache


def options_of(kind: str) -> dict[str, Any]:
    return {"max_cache_len": MAX_CACHE_LEN} if kind == "static" else {}


def filled(name: str, tokens: int, *, batch: int = 1, device: str = "cpu", **changed: Any) -> Any:
    """A cache that a model has filled."""
    cache = new_cache(config_of(name, **changed), "dynamic")
    for index in range(len(cache.layers)):
        cache.update(*torch.randn(2, batch, 2, tokens, 16, device=device).unbind(), index)
    return cache
