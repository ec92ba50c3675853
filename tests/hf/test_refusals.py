"""What cannot be moved is refused in words, and nothing is opened for it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, QuantizedCache

from hf.models import config_of, new_cache
from hf.moving import Daemons, filled, layout
from kvferry_client import Client, FerryError, State, connect
from kvferry_client.transformers_cache import CacheSending, layout_of, receive_cache, send_cache
from kvferry_client.transformers_layers import KNOWN_VERSIONS, require_known

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("kind", ["linear_attention", "hybrid"])
def test_a_model_that_keeps_more_than_tokens_has_no_layout(kind: str) -> None:
    config = config_of("llama")
    config.layer_types = [kind, "full_attention"]
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


@pytest.mark.parametrize("version", ["4.57.6", "5.23.0", "5.25.0", "6.0.0.dev0", "5.2"])
def test_an_unknown_transformers_is_refused(version: str) -> None:
    with pytest.raises(FerryError) as refused:
        require_known(version)
    assert refused.value.code == "engine_unsupported"
    assert refused.value.message == (
        f"transformers {version} is installed; its caches are known of 5.24"
    )


def test_the_docs_table_names_the_versions_that_are_known() -> None:
    docs = (ROOT / "docs" / "engines.md").read_text()
    (row,) = re.findall(r"^\| transformers \| ([^|]+) \|", docs, re.MULTILINE)
    assert row == ", ".join(f"{known}.x" for known in KNOWN_VERSIONS)


def test_what_is_installed_and_what_we_ask_for_is_known() -> None:
    require_known(transformers.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (asked,) = [
        one
        for one in project["project"]["optional-dependencies"]["demo"]
        if one.startswith("transformers")
    ]
    first, _, behind = asked.removeprefix("transformers>=").partition(",<")
    require_known(first)
    major, minor = KNOWN_VERSIONS[-1].split(".")
    assert behind == f"{major}.{int(minor) + 1}"
