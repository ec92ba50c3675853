"""Tiny random models of every kind of cache, and what one process makes of them."""

import hashlib
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

VOCABULARY_TOKENS = 256
NEW_TOKENS = 16
SLIDING_WINDOW = 24
PROMPT_TOKENS = 150
MAX_CACHE_LEN = 192
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # With the default of 0.02 attention is nearly flat and any cache gives the same tokens.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MLA = {
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
MIXED = {
    "head_dim": 16,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}


def config_of(name: str, **changed: Any) -> Any:
    """The config of a model, with some fields changed."""
    match name:
        case "llama":
            return LlamaConfig(**{**COMMON, **changed})
        case "mistral":  # sliding layers only
            return MistralConfig(**{**COMMON, "sliding_window": SLIDING_WINDOW, **changed})
        case "gemma":  # one sliding layer and one full
            return Gemma3TextConfig(**{**COMMON, **MIXED, **changed})
        case _:  # MLA
            return DeepseekV3Config(**{**COMMON, **MLA, **changed})


CLASSES: dict[str, Any] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "gemma": Gemma3ForCausalLM,
    "deepseek": DeepseekV3ForCausalLM,
}
_built: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """The model, the same weights every time."""
    if name not in _built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            _built[name] = CLASSES[name](config_of(name)).train(False).requires_grad_(False)
        if name == "gemma":  # it norms queries and keys, so larger initial weights do nothing
            for layer in _built[name].model.layers:
                layer.self_attn.q_norm.weight.fill_(4.0)
    return _built[name]


def prompt(tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    """(1, tokens) ids."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY_TOKENS, (1, tokens), generator=generator)


def new_cache(config: Any, kind: str) -> Any:
    """An empty cache, dynamic or static."""
    if kind == "dynamic":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=MAX_CACHE_LEN)


def prefill(model: Any, cache: Any, ids: torch.Tensor) -> int:
    """Put tokens into a cache; the next token."""
    return int(model(input_ids=ids, cache=cache, logits_to_keep=1).logits[0, -1].argmax())


def generate(model: Any, cache: Any, token: int) -> list[int]:
    """Go on from a cache."""
    tokens = [token]
    while len(tokens) < NEW_TOKENS:
        tokens.append(prefill(model, cache, torch.tensor([tokens[-1:]])))
    return tokens


def digests(cache: Any, tokens: int) -> dict[str, str]:
    """A hash of the bytes of every plane that the next token looks at, wherever they lie."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for part in ("keys", "values"):
            rows = getattr(layer, part)[0]
            rows = rows[:, : min(tokens, rows.shape[1])]
            if layer.is_sliding:
                rows = rows[:, -(SLIDING_WINDOW - 1) :]
            data = rows.contiguous().numpy().tobytes()
            found[f"{index}.{part}"] = hashlib.blake2b(data).hexdigest()
    return found
