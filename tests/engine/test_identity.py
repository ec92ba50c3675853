"""How prefill and decode name the model that a payload is of, whatever words an engine was started with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry_client import sglang_identity
from kvferry_client.vllm_identity import CACHE_DTYPE, model_identity


def config(directory: Path, cache_dtype: str, dtype: torch.dtype) -> Any:
    """What is read of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(directory),
            revision=None,
            quantization=None,
            dtype=dtype,
            hf_config=SimpleNamespace(to_dict=lambda: {"hidden_size": 64}),
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
    )


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        (("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), True),
        (("auto", torch.float16), ("float16", torch.bfloat16), True),
        (("fp8", torch.bfloat16), ("fp8_e4m3", torch.bfloat16), True),
        (("auto", torch.bfloat16), ("auto", torch.float16), False),
        (("auto", torch.bfloat16), ("float16", torch.bfloat16), False),
        (("fp8", torch.bfloat16), ("fp8_e5m2", torch.bfloat16), False),
        (("auto", torch.bfloat16), ("fp8", torch.bfloat16), False),
    ],
)
def test_a_caches_dtype_is_compared_as_what_it_is(
    tmp_path: Path, one: tuple[str, torch.dtype], other: tuple[str, torch.dtype], are_alike: bool
) -> None:
    """Not as what an engine was told: `auto` is the model's own."""
    here, there = (model_identity(config(tmp_path, *told), {}) for told in (one, other))
    assert (here == there) is are_alike
    assert {name for name in here if here[name] != there[name]} <= {CACHE_DTYPE}


def test_an_empty_fingerprint_is_none(tmp_path: Path) -> None:
    """As of a chart whose value nobody set: it would let any model pass for any other."""
    loaded = config(tmp_path, "auto", torch.bfloat16)
    assert model_identity(loaded, {"model_fingerprint": ""}) == model_identity(loaded, {})
    assert set(model_identity(loaded, {"model_fingerprint": "mine"}).values()) == {"mine"}


def of_sglang(directory: Path, **changed: Any) -> dict[str, str]:
    """A model as an engine of SGLang's tells it, which has written ``changed`` beside it."""
    told = {"hidden_size": 64, "context_len": 4096, "encoder_only": False, "language_only": False}
    return sglang_identity.model_identity(
        SimpleNamespace(model_path=str(directory), revision=None),
        SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: told | changed), quantization=None
        ),
        SimpleNamespace(dtype=torch.bfloat16),
    )


@pytest.mark.parametrize(
    "served",
    [
        {"context_len": 8192},
        {"encoder_only": True},
        {"language_only": True},
        {"language_model_only": True},
    ],
)
def test_how_sglang_serves_a_model_is_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: dict[str, Any]
) -> None:
    """It writes that into the model's configuration, at every start."""
    monkeypatch.delenv(sglang_identity.TOLD, raising=False)
    assert of_sglang(tmp_path, **served) == of_sglang(tmp_path)
    here, there = of_sglang(tmp_path), of_sglang(tmp_path, hidden_size=128)
    assert {name for name in here if here[name] != there[name]} == {"model.config"}


def test_an_empty_fingerprint_is_none_for_sglang_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(sglang_identity.TOLD, raising=False)
    worked_out = of_sglang(tmp_path)
    monkeypatch.setenv(sglang_identity.TOLD, "")
    assert of_sglang(tmp_path) == worked_out
    monkeypatch.setenv(sglang_identity.TOLD, "mine")
    assert set(of_sglang(tmp_path).values()) == {"mine"}
