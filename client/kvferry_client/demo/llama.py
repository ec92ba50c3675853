"""A tiny Llama with random weights, split into the half that prefills and the half that decodes.

Nothing here sends or receives: the prefill half hands out numpy arrays piece by piece, the decode
half takes whole arrays, and whoever stands between them may be a transfer or a plain dict.

Equal tokens alone do not prove an intact cache. Attention sums over the cached tokens, so the
same swap of tokens in a layer's k and v leaves the sum, and with it the answer, as it was; and one
damaged token of thousands seldom shows. Compare the bytes of every plane too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvferry_client.transformers_cache import arrays_of, cache_of
from kvferry_proto.layout import Layout

VOCABULARY_TOKENS = 1024
CONTEXT_TOKENS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Piece:
    """What prefill has to send for tokens ``[first_token, first_token + len(array))``."""

    first_token: int
    arrays: dict[str, NDArray[np.float32]]  # per plane: (tokens, kv_heads, head_dim) float32
    next_token: int | None  # the first greedy token; None on every piece but the last


def build_model(seed: int) -> LlamaForCausalLM:
    """Build the model; the same seed gives the same weights in every process."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_TOKENS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS_MAX,
        # With the default of 0.02 attention is nearly flat and any cache gives the same tokens.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers as they were
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.train(False).requires_grad_(False)
    return model


def prompt(tokens: int, seed: int) -> torch.Tensor:
    """Draw a prompt: (tokens,) int64, the same for the same seed."""
    assert 0 < tokens <= CONTEXT_TOKENS_MAX
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY_TOKENS, (tokens,), generator=generator)


def prefill_in_pieces(
    model: LlamaForCausalLM, layout: Layout, ids: torch.Tensor, piece_tokens: int
) -> Iterator[Piece]:
    """Prefill ``ids`` ((tokens,) int64), yielding each piece's cache as soon as it exists."""
    cache = DynamicCache(config=model.config)
    for first, token in _prefill(model, cache, ids, piece_tokens):
        last = cache.get_seq_length()
        pieces = arrays_of(cache, layout, first, last)
        arrays = {name: piece.numpy() for name, piece in pieces.items()}
        yield Piece(first, arrays, token if last == len(ids) else None)


def decode(
    model: LlamaForCausalLM,
    planes: Mapping[str, NDArray[np.float32]],
    first_token: int,
    new_tokens: int,
) -> list[int]:
    """Take over a prefilled cache and generate ``new_tokens`` tokens, ``first_token`` included.

    ``planes``: per plane (tokens, kv_heads, head_dim) float32; they are copied, so their memory
    may be given back once this returns.
    """
    # Copies: torch warns of arrays that may not be written.
    cache = cache_of(model.config, {name: torch.tensor(plane) for name, plane in planes.items()})
    return _greedy(model, cache, first_token, new_tokens)


def reference(
    model: LlamaForCausalLM, ids: torch.Tensor, piece_tokens: int, new_tokens: int
) -> list[int]:
    """The tokens that ``decode`` must give: the same pieces, the cache never taken out.

    The pieces matter: other piece sizes round differently, and a near tie may then fall the
    other way.
    """
    cache = DynamicCache(config=model.config)
    *_, (_, token) = _prefill(model, cache, ids, piece_tokens)
    return _greedy(model, cache, token, new_tokens)


def _prefill(
    model: LlamaForCausalLM, cache: DynamicCache, ids: torch.Tensor, piece_tokens: int
) -> Iterator[tuple[int, int]]:
    """Fill ``cache`` piece by piece; yield each piece's first token and the best next one."""
    assert piece_tokens > 0
    for first in range(0, len(ids), piece_tokens):
        piece = ids[None, first : first + piece_tokens]
        logits = model(input_ids=piece, cache=cache, logits_to_keep=1).logits
        yield first, int(logits[0, -1].argmax())


def _greedy(
    model: LlamaForCausalLM, cache: DynamicCache, first_token: int, new_tokens: int
) -> list[int]:
    assert new_tokens > 0
    tokens = [first_token]
    while len(tokens) < new_tokens:
        logits = model(input_ids=torch.tensor([tokens[-1:]]), cache=cache).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens
