"""Caches of transformers between two daemons: the tokens of one process, and the same bytes."""

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf.models import (
    CLASSES,
    PROMPT_TOKENS,
    SLIDING_WINDOW,
    config_of,
    digests,
    generate,
    model_of,
    new_cache,
    prefill,
    prompt,
)
from hf.moving import Daemons, filled, moved, options_of, receiving
from kvferry_client.transformers_cache import CacheSending

KINDS = ("dynamic", "static")


@pytest.mark.parametrize("sink", KINDS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_decode_goes_on_as_one_process_would(
    daemons: Daemons, name: str, source: str, sink: str
) -> None:
    model = model_of(name)
    cache = new_cache(model.config, source)
    token = prefill(model, cache, prompt())
    transfer = f"{name}-{source}-{sink}"
    received = moved(daemons, transfer, cache, model.config, token, **options_of(sink))
    assert type(received) is type(new_cache(model.config, sink))
    assert digests(received, PROMPT_TOKENS) == digests(cache, PROMPT_TOKENS)
    damaged = deepcopy(received)
    alone = generate(model, cache, token)
    assert generate(model, received, token) == alone
    for layer in damaged.layers:
        layer.keys = layer.keys.roll(5, dims=2)
    assert generate(model, damaged, token) != alone


@pytest.mark.parametrize("known", [True, False], ids=["total known", "total late"])
@pytest.mark.parametrize("chunk", [10, 40])  # below and above the sliding window
@pytest.mark.parametrize("name", ["gemma", "deepseek"])
def test_a_cache_is_sent_as_it_grows(daemons: Daemons, name: str, chunk: int, known: bool) -> None:
    model = model_of(name)
    cache = new_cache(model.config, "dynamic")
    transfer = f"grows-{name}-{chunk}-{known}"
    ready = []
    with (
        receiving(daemons, transfer, model.config) as (client, arriving),
        CacheSending(
            client, transfer, cache, total_tokens=PROMPT_TOKENS if known else None
        ) as sending,
    ):
        for first in range(0, PROMPT_TOKENS, chunk):
            token = prefill(model, cache, prompt()[:, first : first + chunk])
            last = cache.get_seq_length() == PROMPT_TOKENS
            sending.add({"first_token": token} if last else None)
            ready.append(sending.sending.snapshot.available_tokens)
        sending.sending.finish()
        received = arriving.result(60)
    assert ready == [*range(chunk, PROMPT_TOKENS, chunk), PROMPT_TOKENS]
    assert digests(received.cache, PROMPT_TOKENS) == digests(cache, PROMPT_TOKENS)
    for layer in received.cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "holds more than it shows"
    assert generate(model, received.cache, token) == generate(model, cache, token)


class Allocated:
    """What was taken with torch.empty, for as long as it lives."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.peak_bytes = 0
        self._living: list[weakref.ref[torch.Tensor]] = []
        self._empty = torch.empty
        patch.setattr(torch, "empty", self._take)

    def _take(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = self._empty(*args, **kwargs)
        self.shapes.append(tuple(tensor.shape))
        self._living.append(weakref.ref(tensor))
        living = [one for one in (ref() for ref in self._living) if one is not None]
        self.peak_bytes = max(self.peak_bytes, sum(one.nbytes for one in living))
        return tensor


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_sink_that_knows_the_total_takes_the_memory_of_the_result_once(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cache = filled(name, PROMPT_TOKENS)
    allocated = Allocated(monkeypatch)
    received = moved(daemons, f"once-{name}", cache, config_of(name), 0)
    rows = PROMPT_TOKENS if name == "llama" else SLIDING_WINDOW - 1
    assert allocated.shapes == [(2, rows, 16)] * 4
    assert digests(received, PROMPT_TOKENS) == digests(cache, PROMPT_TOKENS)


def test_a_sink_that_does_not_know_the_total_keeps_two_sliding_windows_at_most(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("mistral")
    cache = new_cache(config, "dynamic")
    allocated = Allocated(monkeypatch)
    with (
        receiving(daemons, "late", config) as (client, arriving),
        CacheSending(client, "late", cache) as sending,
    ):
        for _ in range(20):
            for index in range(2):
                cache.update(*torch.randn(2, 1, 2, 16, 16).unbind(), index)
            sending.add()
        sending.sending.finish({"first_token": 1})
        received = arriving.result(60)
    token_bytes = 2 * 2 * 2 * 16 * 4
    assert 0 < allocated.peak_bytes <= 2 * (SLIDING_WINDOW - 1) * token_bytes
    assert digests(received.cache, 320) == digests(cache, 320)


@pytest.mark.gpu
def test_a_cache_in_a_gpu_goes_through_a_pool_in_host_memory(daemons: Daemons) -> None:
    cache = filled("llama", PROMPT_TOKENS, device="cuda")
    received = moved(daemons, "gpu", cache, config_of("llama"), 0, device="cuda")
    for ours, theirs in zip(cache.layers, received.layers, strict=True):
        assert theirs.keys.device.type == "cuda"
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("tokens", [1, SLIDING_WINDOW - 1, SLIDING_WINDOW, SLIDING_WINDOW + 1])
@pytest.mark.parametrize("sink", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_the_edge_of_the_sliding_window(
    daemons: Daemons, source: str, sink: str, tokens: int
) -> None:
    model = model_of("gemma")
    cache = new_cache(model.config, source)
    token = prefill(model, cache, prompt(tokens))
    transfer = f"edge-{source}-{sink}-{tokens}"
    received = moved(daemons, transfer, cache, model.config, token, **options_of(sink))
    assert digests(received, tokens) == digests(cache, tokens)
    assert generate(model, received, token) == generate(model, cache, token)


def test_a_cache_that_kept_everything_serves_a_model_with_a_window(daemons: Daemons) -> None:
    """As DynamicCache() does, which has not seen the config."""
    model = model_of("mistral")
    cache, everything = new_cache(model.config, "dynamic"), DynamicCache()
    token = prefill(model, cache, prompt())
    prefill(model, everything, prompt())
    received = moved(daemons, "everything", everything, model.config, token)
    assert digests(received, PROMPT_TOKENS) == digests(cache, PROMPT_TOKENS)
    assert generate(model, received, token) == generate(model, cache, token)


def test_bfloat16_arrives_bit_by_bit(daemons: Daemons) -> None:
    config = config_of("llama", dtype="bfloat16")
    cache = new_cache(config, "dynamic")
    for index in range(2):
        bits = torch.randint(-(1 << 15), 1 << 15, (2, 1, 2, 100, 16), dtype=torch.int16)
        cache.update(*bits.view(torch.bfloat16), index)
    received = moved(daemons, "bfloat16", cache, config, 0)
    for ours, theirs in zip(cache.layers, received.layers, strict=True):
        for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert torch.equal(one.view(torch.int16), other.view(torch.int16))


def test_a_cache_may_be_wanted_on_a_device_that_the_pool_is_not_in(daemons: Daemons) -> None:
    cache = filled("llama", 100)
    received = moved(daemons, "device", cache, config_of("llama"), 0, device="meta")
    assert {layer.keys.device.type for layer in received.layers} == {"meta"}
    assert received.get_seq_length() == 100


def test_aux_values_may_come_behind_the_last_tokens(daemons: Daemons) -> None:
    """The total is not told yet: an `add` without a new token said nothing of them."""
    cache = filled("llama", 20)
    with receiving(daemons, "aux-behind", config_of("llama")) as (client, arriving):
        with CacheSending(client, "aux-behind", cache) as sending:
            sending.add()
            sending.add({"first_token": 7})
        assert arriving.result(60).aux == {"first_token": 7}
