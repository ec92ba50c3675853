"""How many bytes a token of a model is, and which window and pool suit it on a link: arithmetic.

Nothing is loaded but the numbers of a Hugging Face ``config.json``. Engines may keep a cache in
other ways; `kvferry status` shows the blocks of the layout that they really came with.
"""

import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from kvferry_proto.layout import Dtype

BLOCK_TOKENS = 128
WINDOW_MIN_TOKENS = 2048  # below it what each window takes of the worker's time costs speed
WITH_TOKENS = {"full_attention", "sliding_attention", "chunked_attention"}
# What makes a cache of a kind that is not known here: an indexer's keys, other heads in some layers,
# layers without a state per token, KV heads under another name.
NOT_KNOWN = (
    "index_topk",
    "global_head_dim",
    "num_global_key_value_heads",
    "block_configs",
    "num_kv_heads",
    "multi_query_group_num",
    "attn_layer_period",
    "hybrid_override_pattern",
    "linear_attn_config",
)


class ModelRefused(Exception):
    """The size of this model's cache cannot be told from its config; the message says why."""


class Cache(NamedTuple):
    """What one rank keeps of one token."""

    layers: int
    heads: int  # of keys, and as many of values; with MLA one latent
    elements: int  # of a head's key and value together
    dtype: Dtype
    is_latent: bool
    sliding_layers: int  # that engines keep the last tokens of; blocks have room for every token

    @property
    def token_bytes(self) -> int:
        """Bytes of a token over all layers."""
        return self.layers * self.heads * self.elements * self.dtype.element_bytes


class Plan(NamedTuple):
    """What to set, and where it comes from. Bytes are those of all ranks of a group together."""

    token_bytes: int
    block_bytes: int  # of one rank
    tokens_per_s: int
    window_tokens: int
    window_bytes: int
    role_bytes: int
    budget_bytes: int


def read_model(path: Path) -> dict[str, Any]:
    """The numbers of a config.json, a multimodal model's language part; raises ModelRefused."""
    try:
        whole = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(whole, dict):
        raise ModelRefused(f"{path} is no model's config: it holds a {type(whole).__name__}")
    inner = whole.get("text_config")
    return {**whole, **inner} if isinstance(inner, dict) else whole


def cache_of(model: Mapping[str, Any], ranks: int = 1, dtype: Dtype | None = None) -> Cache:
    """What each of so many tensor-parallel ranks keeps of a token; raises ModelRefused.

    ``dtype`` is the cache's, if it is not the model's.
    """
    found = [name for name in NOT_KNOWN if model.get(name) is not None] or _differing(model)
    if found:
        raise ModelRefused(f"{found[0]}: a cache of a kind whose size is not known here")
    layers = _own_layers(model)
    kinds = (model.get("layer_types") or [])[:layers]
    without = set(kinds) - WITH_TOKENS
    if without:
        raise ModelRefused(f"layer_types: {min(without)} layers keep no state per token")
    is_latent = model.get("kv_lora_rank") is not None
    if is_latent:  # every rank has it whole
        heads, elements = 1, _count(model, "kv_lora_rank") + _count(model, "qk_rope_head_dim")
    else:
        heads, elements = _heads(model, ranks), 2 * _head_dim(model)
    sliding = len(kinds) - kinds.count("full_attention")
    return Cache(layers, heads, elements, dtype or _dtype(model), is_latent, sliding)


def plan(cache: Cache, *, link_gbit: float, concurrent: int, ranks: int, resume_ms: float) -> Plan:
    """The window that keeps a link busy, and the pool that gives each of ``concurrent`` one.

    ``resume_ms``: from a token's arrival to the worker's resume behind it. Half of a window must
    hold what the link brings meanwhile, since the other half is being taken over.
    """
    token_bytes = cache.token_bytes * ranks
    tokens_per_s = link_gbit * 1e9 / 8 / token_bytes
    needed_tokens = max(WINDOW_MIN_TOKENS, 2 * tokens_per_s * resume_ms / 1000)
    window_tokens = ceil(needed_tokens / BLOCK_TOKENS) * BLOCK_TOKENS
    role_bytes = concurrent * window_tokens * token_bytes
    return Plan(
        token_bytes=token_bytes,
        block_bytes=BLOCK_TOKENS * cache.token_bytes,
        tokens_per_s=int(tokens_per_s),
        window_tokens=window_tokens,
        window_bytes=window_tokens * token_bytes,
        role_bytes=role_bytes,
        budget_bytes=2 * role_bytes,
    )


def _differing(model: Mapping[str, Any]) -> list[str]:
    """Settings that are known, but for their values: heads or layers that are not all alike."""
    interval = model.get("full_attention_interval")
    sliding_heads, value_dim = model.get("swa_num_key_value_heads"), model.get("v_head_dim")
    is_latent = model.get("kv_lora_rank") is not None  # no head of values is kept
    found = {
        "multi_query": bool(model.get("multi_query")),
        "attn_type_list": any(kind != 1 for kind in model.get("attn_type_list") or []),
        "full_attention_interval": interval is not None and not model.get("layer_types"),
        "swa_num_key_value_heads": sliding_heads not in (None, model.get("num_key_value_heads")),
        "v_head_dim": value_dim is not None and not is_latent and value_dim != _head_dim(model),
    }
    return [name for name, differs in found.items() if differs]


def _own_layers(model: Mapping[str, Any]) -> int:
    """Layers with a cache of their own: the last ones may read an earlier one's."""
    layers, shared = _count(model, "num_hidden_layers"), model.get("num_kv_shared_layers") or 0
    if type(shared) is not int or not 0 <= shared < layers:
        raise ModelRefused(f"num_kv_shared_layers: {shared!r} of {layers} layers")
    return layers - shared


def _heads(model: Mapping[str, Any], ranks: int) -> int:
    """KV heads of one rank; above one rank a head, all ranks of a head keep it."""
    name = "num_key_value_heads"
    heads = _count(model, name if model.get(name) is not None else "num_attention_heads")
    if max(heads, ranks) % min(heads, ranks):
        raise ModelRefused(f"{heads} KV heads and {ranks} ranks: neither divides the other")
    return max(1, heads // ranks)


def _head_dim(model: Mapping[str, Any]) -> int:
    if model.get("head_dim") is not None:
        return _count(model, "head_dim")
    return _count(model, "hidden_size") // _count(model, "num_attention_heads")


def _dtype(model: Mapping[str, Any]) -> Dtype:
    word = model.get("dtype") or model.get("torch_dtype")
    try:
        return Dtype(str(word).removeprefix("torch."))
    except ValueError as error:
        raise ModelRefused(
            f"dtype: {word!r} is none that a plane can have; name the cache's"
        ) from error


def _count(model: Mapping[str, Any], name: str) -> int:
    value = model.get(name)
    if type(value) is not int or value < 1:
        raise ModelRefused(f"{name}: {value!r} is not a count; is this a model's config.json?")
    return value
