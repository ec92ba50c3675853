"""vLLM's cache as planes, and its block tables. No engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # what importing vLLM warns of
SAME_END = "x" * 30 + ".layers.0.self_attn.attn"


def cache(*layers: str) -> Any:
    """The planes of an engine with these layers, all in one group."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from kvferry_client.vllm_cache import cache_of

    class Layer(AttentionLayerBase):  # type: ignore[misc]
        def get_attn_backend(self) -> Any:
            return SimpleNamespace(get_name=lambda: "FLASH_ATTN")

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            raise NotImplementedError

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={one: Layer() for one in layers}),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 2),
    )
    groups = [KVCacheGroupSpec([*layers], spec)]
    of_blocks = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)
    tensors = {one: torch.zeros(4, 2, 16, 64) for one in layers}
    return cache_of(tensors, config, of_blocks, 128)


def test_layers_are_named_by_their_ends() -> None:
    found = cache(f"a.{SAME_END}", "b.layers.1.self_attn.attn")
    assert list(found.planes.values()) == [f"a.{SAME_END}"[-40:], "b.layers.1.self_attn.attn"]
    assert set(found.groups[0].planes) == set(found.planes.values())


def test_layers_that_would_share_a_name_are_refused() -> None:
    """One of them would not travel, and nobody would notice."""
    with pytest.raises(ValueError, match=r"b\.x+\.layers\.0.* another layer's"):
        cache(f"a.{SAME_END}", f"b.{SAME_END}")


def test_a_table_is_padded_behind_the_tokens_that_it_has_to_hold() -> None:
    """Groups with smaller blocks have nothing where the largest block's end is rounded up to."""
    from kvferry_client.engine import NO_BLOCK
    from kvferry_client.vllm_worker import padded

    tables = ([3, 4], [5, 6, 7, 8])
    assert padded(tables, [32, 16], 50, 96) == (
        [3, 4, NO_BLOCK],
        [5, 6, 7, 8, NO_BLOCK, NO_BLOCK],
    )
    assert padded(tables, [32, 16], 50, 32) == tables


def test_a_table_that_is_too_short_stays_so() -> None:
    """Whoever copies says that, and the request fails: its tokens are somewhere."""
    from kvferry_client.vllm_worker import padded

    assert padded(([3], [5, 6, 7, 8]), [32, 16], 50, 64) == ([3], [5, 6, 7, 8])
    assert padded(([3, 4], [5, 6, 7]), [32, 16], 50, 64) == ([3, 4], [5, 6, 7])
