"""Caches of transformers between two daemons: the tokens of one process, and the same bytes."""

import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, QuantizedCache

from hf.models import (
    CLASSES,
    MAX_CACHE_LEN,
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
from kvferry_client import Client, FerryError, State, connect
from kvferry_client.transformers_cache import (
    CacheSending,
    layout_of,
    receive_cache,
    send_cache,
)
from kvferry_client.transformers_layers import KNOWN_VERSIONS, require_known
from live import LiveDaemon

BLOCK, WINDOW = 16, 64
KINDS = ("dynamic", "static")
AUX = ("first_token",)
Daemons = tuple[LiveDaemon, LiveDaemon]


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """A source's and a sink's daemon, for all tests: each layout has a pool of its own."""
    directory: Path = tmp_path_factory.mktemp("hf")
    with LiveDaemon(directory / "a") as a, LiveDaemon(directory / "b") as b:
        yield a, b
        for daemon in (a, b):
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would only wait for each other beside two daemons."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layout(config: Any, dtype: Any = None) -> Any:
    return layout_of(config, dtype, block_size_tokens=BLOCK, aux=AUX)


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


def filled(name: str, tokens: int, *, batch: int = 1, **changed: Any) -> Any:
    """A cache that a model has filled."""
    cache = new_cache(config_of(name, **changed), "dynamic")
    for index in range(len(cache.layers)):
        cache.update(*torch.randn(2, batch, 2, tokens, 16).unbind(), index)
    return cache


class _Stranger(DynamicCache):
    pass


def quantized() -> Any:
    return QuantizedCache("fp8", config=config_of("llama"))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "layers": (lambda: filled("llama", 9, num_hidden_layers=3), "layout_mismatch", "number of planes: 4 and 6"),
    "heads": (lambda: cache_with(heads=4), "layout_mismatch", "(layer.0.k) shape: (2, 16) and (4, 16)"),
    "head_dim": (lambda: cache_with(dim=8), "layout_mismatch", "(layer.0.k) shape: (2, 16) and (2, 8)"),
    "dtype": (lambda: cache_with(dtype=torch.float16), "layout_mismatch", "(layer.0.k) dtype: float32 and float16"),
    "batch": (lambda: filled("llama", 9, batch=2), "bad_cache", "a batch of 2, not of 1"),
    "empty": (lambda: filled("llama", 0), "bad_cache", "no token"),
    "uneven": (lambda: uneven(), "bad_cache", "the layers have 9 to 10 tokens"),
    "class": (lambda: _Stranger(config=config_of("llama")), "bad_cache", "a _Stranger"),
    "quantized": (quantized, "bad_cache", "a QuantizedCache"),
    "window": (lambda: filled("mistral", 60), "layout_mismatch", "layer.0.k needs token 0, and the cache begins at 37"),
}  # fmt: skip


def cache_with(heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    cache = new_cache(config_of("llama"), "dynamic")
    for index in range(2):
        cache.update(*torch.zeros(2, 1, heads, 9, dim, dtype=dtype).unbind(), index)
    return cache


def uneven() -> Any:
    cache = filled("llama", 9)
    cache.update(*torch.zeros(2, 1, 2, 1, 16).unbind(), 1)
    return cache


@pytest.mark.parametrize("why", REFUSED)
def test_a_source_refuses_what_is_not_of_the_layout(daemons: Daemons, why: str) -> None:
    make, code, words = REFUSED[why]
    with connect(daemons[0].directory, layout(config_of("llama"))) as client:
        with pytest.raises(FerryError) as refused:
            send_cache(client, f"refused-{why}", make(), aux={"first_token": 1})
        assert (refused.value.code, words in refused.value.message) == (code, True), refused.value
    assert daemons[0].transfers(f"refused-{why}") == [], "nothing was opened"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_hidden_layers": 3}, "number of planes: 4 and 6"),
        ({"num_key_value_heads": 4}, "(layer.0.k) shape: (2, 16) and (4, 16)"),
        ({"dtype": "float16"}, "(layer.0.k) dtype: float32 and float16"),
    ],
)
def test_a_sink_refuses_a_layout_that_is_not_of_its_model(
    daemons: Daemons, changed: dict[str, Any], words: str
) -> None:
    source, sink = daemons
    with (
        connect(sink.directory, layout(config_of("llama"))) as client,
        pytest.raises(FerryError) as refused,
    ):
        receive_cache(client, "of-another", source.address, config_of("llama", **changed))
    assert refused.value.code == "layout_mismatch"
    assert words in refused.value.message
    assert sink.transfers("of-another") == [], "nothing was opened"


def test_models_that_differ_only_in_their_window_are_told_apart(daemons: Daemons) -> None:
    source, sink = daemons
    wider = config_of("mistral", sliding_window=40)
    with (
        connect(source.directory, layout(config_of("mistral"))) as client,
        connect(sink.directory, layout(wider)) as other,
    ):
        send_cache(client, "wider", filled("mistral", 20), aux={"first_token": 1})
        with pytest.raises(FerryError) as refused:
            receive_cache(other, "wider", source.address, wider)
    assert refused.value.code == "layout_mismatch"
    assert "layer.0.k.last23 at the source, layer.0.k.last39 at the sink" in refused.value.message


def test_a_static_cache_that_is_too_small_is_refused(daemons: Daemons) -> None:
    source, sink = daemons
    with (
        connect(source.directory, layout(config_of("llama"))) as client,
        connect(sink.directory, layout(config_of("llama"))) as other,
    ):
        send_cache(client, "small", filled("llama", 60), aux={"first_token": 1})
        with pytest.raises(FerryError) as refused:
            receive_cache(other, "small", source.address, config_of("llama"), max_cache_len=59)
    assert refused.value.code == "bad_cache"
    assert "60 tokens or more, and room for 59" in refused.value.message


def add_shrink_and_add(client: Client, cache: Any) -> None:
    with CacheSending(client, "shrinks", cache) as sending:
        sending.add()
        cache.crop(-20)
        sending.add()


def test_a_cache_that_became_another_on_the_way_is_refused_and_aborted(daemons: Daemons) -> None:
    cache = filled("llama", 60)
    with connect(daemons[0].directory, layout(config_of("llama"))) as client:
        with pytest.raises(FerryError) as refused:
            add_shrink_and_add(client, cache)
        assert refused.value.code == "bad_cache"
        assert "60 tokens were sent, and it has 40 now" in refused.value.message
    (row,) = daemons[0].transfers("shrinks")
    assert row.snapshot.state is State.FAILED


@pytest.mark.parametrize("kind", ["mamba", "linear attention"])
def test_a_model_that_keeps_more_than_tokens_has_no_layout(kind: str) -> None:
    config = config_of("llama")
    config.layer_types = ["linear_attention" if kind == "mamba" else "hybrid", "full_attention"]
    with pytest.raises(FerryError) as refused:
        layout_of(config)
    assert refused.value.code == "bad_cache"
    assert "layer 0 is a LinearAttention" in refused.value.message


def test_layers_that_look_at_another_have_no_planes() -> None:
    config = config_of("llama", num_hidden_layers=3)
    config.kv_sharing_modes = [None, None, "reuse"]
    assert [plane.name for plane in layout_of(config).planes] == [
        "layer.0.k", "layer.0.v", "layer.1.k", "layer.1.v",
    ]  # fmt: skip


@pytest.mark.parametrize("version", ["4.57.6", "5.22.2", "5.25.0", "6.0.0.dev0", "5.2"])
def test_an_unknown_transformers_is_refused(version: str) -> None:
    with pytest.raises(FerryError) as refused:
        require_known(version)
    assert refused.value.code == "engine_unsupported"
    assert refused.value.message == (
        f"transformers {version} is installed; its caches are known of 5.23 and 5.24"
    )


def test_what_is_installed_and_what_we_ask_for_is_known() -> None:
    require_known(transformers.__version__)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (asked,) = [
        one
        for one in project["project"]["optional-dependencies"]["demo"]
        if one.startswith("transformers")
    ]
    first, _, behind = asked.removeprefix("transformers>=").partition(",<")
    require_known(first)
    major, minor = KNOWN_VERSIONS[-1].split(".")
    assert behind == f"{major}.{int(minor) + 1}"
