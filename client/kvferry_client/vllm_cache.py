"""vLLM's KV cache as planes: which layers travel, how they lie, and how many heads there are in all.

vLLM shows every attention layer as (blocks, heads, tokens, content). Some kernels keep a token's
content together there. Others, the CPU's among them, arrange a block as they like, all keys before
all values: such a block means something only as a whole, to the same kernel with the same block
size. Then whole blocks travel, and the planes' names say what can read them.
"""

from collections.abc import Mapping
from math import lcm
from typing import Any, NamedTuple

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
)

from kvferry_client.engine import layout_of
from kvferry_client.paged import CachePlane, PagedCache
from kvferry_client.vllm_identity import NAMES
from kvferry_proto.layout import Layout, Order

KEPT = (FullAttentionSpec, MLAAttentionSpec)  # and none of their kinds that drop blocks
TOKENS_APART = ("FLASH_ATTN", "TRITON_ATTN")  # backends that keep a token's content together
NAME_CHARS_MAX = 40  # of a layer; what can read it comes behind


class Cache(NamedTuple):
    """One worker's share of an engine's cache."""

    layout: Layout
    groups: list[PagedCache]
    planes: dict[str, str]  # by the name of the layer
    whole_tokens: (
        int  # payloads are rounded up to this, so that whole blocks travel; 1: they need not
    )

    def whole(self, tokens: int, total_tokens: int) -> int:
        """How many of ``tokens`` can travel: at a payload's end up to the end of its last block."""
        if tokens == total_tokens:
            return self.rounded(tokens)
        return tokens - tokens % self.whole_tokens

    def rounded(self, tokens: int) -> int:
        """Tokens up to the end of the block."""
        return -(-tokens // self.whole_tokens) * self.whole_tokens


def cache_of(
    kv_caches: Mapping[str, torch.Tensor],
    vllm_config: Any,
    cache_config: Any,
    pool_block_tokens: int,
) -> Cache:
    """The layers that travel; ValueError names the first that cannot be carried.

    ``cache_config``: vLLM's KVCacheConfig.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    groups: list[dict[str, CachePlane]] = []
    heads_total: dict[str, int] = {}
    names: dict[str, str] = {}
    whole_tokens = 1
    for group in (cache_config.kv_cache_groups[one] for one in cache_config.transfer_group_ids):
        planes = {}
        for layer in group.layer_names:
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(
                layer, group.kv_cache_spec
            )
            plane = _plane(layer, kv_caches[layer], spec)
            reader = _reader(layers[layer].get_attn_backend().get_name(), spec)
            if reader:
                whole_tokens = lcm(whole_tokens, spec.block_size)
            name = layer[-NAME_CHARS_MAX:] + reader
            if name in names.values():
                raise ValueError(f"layer {layer}: the plane {name} is another layer's already")
            names[layer] = name
            planes[name] = plane
            if plane.tensor.ndim == 4:
                heads_total[name] = _heads_total(spec.num_heads, vllm_config)
        groups.append(planes)
    layout = layout_of(
        groups, heads_total=heads_total, block_size_tokens=pool_block_tokens, identity=NAMES
    )
    return Cache(layout, [PagedCache(planes) for planes in groups], names, whole_tokens)


def keeps_all_blocks(cache_config: Any) -> bool:
    """Whether vLLM keeps all blocks of a prompt for as long as its request runs."""
    groups = [cache_config.kv_cache_groups[one] for one in cache_config.transfer_group_ids]
    specs = [spec for group in groups for spec in _specs(group.kv_cache_spec)]
    return all(type(spec) in KEPT for spec in specs)


def _specs(spec: Any) -> list[Any]:
    """Of each layer, where they differ."""
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def _plane(layer: str, tensor: torch.Tensor, spec: Any) -> CachePlane:
    kind = type(spec).__name__
    if not isinstance(spec, AttentionSpec) or spec.tokens_per_state != 1:
        raise ValueError(f"layer {layer}: {kind} holds no state per token, and is not carried")
    if tensor.ndim == 3 and tensor.shape[1] == spec.block_size:
        return CachePlane(tensor)
    if tensor.ndim != 4 or tuple(tensor.shape[1:3]) != (spec.num_heads, spec.block_size):
        raise ValueError(
            f"layer {layer}: (blocks, {spec.num_heads}, {spec.block_size}, content) is expected "
            f"of {kind}, not {tuple(tensor.shape)}"
        )
    if "MLA" in kind:  # one latent a token, which every rank has
        return CachePlane(tensor[:, 0])
    if tensor.stride(1) >= tensor.stride(2):
        return CachePlane(tensor, Order.HND)
    return CachePlane(tensor.transpose(1, 2))


def _reader(backend: str, spec: Any) -> str:
    """What alone can read a block; nothing, if a token lies together."""
    if backend in TOKENS_APART and spec.kv_quant_mode is KVQuantMode.NONE:
        return ""
    reader = f".{backend}.{spec.block_size}"
    if backend == "CPU_ATTN":
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        reader += f".{_get_attn_isa(spec.dtype, spec.block_size, spec.head_size)}"
    return reader


def _heads_total(heads: int, vllm_config: Any) -> int:
    """Over all ranks; where there are more of those than heads, several hold the same one."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    total = vllm_config.model_config.get_total_num_kv_heads()
    return int(min(ranks, total) if heads == 1 else heads * ranks)
