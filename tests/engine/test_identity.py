"""How prefill and decode name the model that a payload is of, whatever words an engine was started with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
