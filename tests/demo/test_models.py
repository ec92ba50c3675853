"""The demo's models: both halves together give the whole model's tokens, and damage shows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvferry_client.demo import llama, multimodal
from kvferry_client.transformers_cache import layout_of

LENGTHS = pytest.mark.parametrize(("tokens", "piece_tokens"), [(1, 1), (100, 32), (400, 96)])
NEW_TOKENS = 32
DAMAGED_PROMPT_TOKENS = 400

Arrays = dict[str, NDArray[Any]]
Planes = list[tuple[str, str, tuple[int, ...]]]


def joined(pieces: Sequence[llama.Piece | multimodal.Piece], planes: Planes) -> Arrays:
    """Put the pieces of every plane together, as a sink would: by name, range, dtype and shape."""
    tokens = 0
    for piece in pieces:
        assert piece.first_token == tokens, "a gap or an overlap"
        assert list(piece.arrays) == [name for name, _, _ in planes]
        tokens += len(piece.arrays[planes[0][0]])
    whole = {name: np.concatenate([p.arrays[name] for p in pieces]) for name, _, _ in planes}
    for name, dtype, shape in planes:
        assert whole[name].dtype == dtype
        assert whole[name].shape == (tokens, *shape)
        whole[name].flags.writeable = False  # as the pool of somebody else may be
    return whole


def swapped(plane: NDArray[Any]) -> NDArray[Any]:
    """Exchange the first two quarters."""
    quarter = len(plane) // 4
    return np.concatenate([plane[quarter : 2 * quarter], plane[:quarter], plane[2 * quarter :]])


def overwritten(plane: NDArray[Any]) -> NDArray[Any]:
    """Put the first quarter over the second too."""
    quarter = len(plane) // 4
    return np.concatenate([plane[:quarter], plane[:quarter], plane[2 * quarter :]])


@pytest.mark.parametrize("models", [llama, multimodal])
def test_a_seed_gives_the_same_weights_whatever_was_drawn_before(models: Any) -> None:
    first = models.build_model(1).state_dict()
    torch.rand(1)
    again, other = models.build_model(1).state_dict(), models.build_model(2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@LENGTHS
def test_decode_goes_on_where_prefill_stopped(tokens: int, piece_tokens: int) -> None:
    model = llama.build_model(1)
    ids = llama.prompt(tokens, seed=2)
    layout = layout_of(model.config)
    *earlier, last = pieces = list(llama.prefill_in_pieces(model, layout, ids, piece_tokens))
    assert len(pieces) == -(-tokens // piece_tokens)
    assert [piece.next_token for piece in earlier] == [None] * len(earlier)
    assert last.next_token is not None
    planes = joined(pieces, [(p.name, p.dtype.value, p.shape) for p in layout.planes])
    answer = llama.decode(model, planes, last.next_token, NEW_TOKENS)
    assert answer == llama.reference(model, ids, piece_tokens, NEW_TOKENS)
    assert answer[0] == last.next_token
    assert len(answer) == NEW_TOKENS


# The same swap in a layer's k and v is not among these: attention does not ask in which order its
# tokens lie in the cache, so the answer stays. Only the bytes show that one.
@pytest.mark.parametrize(
    ("damage", "damaged"),
    [
        (swapped, ["layer.0.k"]),
        (swapped, ["layer.1.v"]),
        (overwritten, ["layer.0.k", "layer.0.v", "layer.1.k", "layer.1.v"]),
    ],
)
def test_damaged_cache_changes_the_tokens(
    damage: Callable[[NDArray[Any]], NDArray[Any]], damaged: list[str]
) -> None:
    model = llama.build_model(1)
    ids = llama.prompt(DAMAGED_PROMPT_TOKENS, seed=2)
    layout = layout_of(model.config)
    pieces = list(llama.prefill_in_pieces(model, layout, ids, 96))
    planes = joined(pieces, [(p.name, p.dtype.value, p.shape) for p in layout.planes])
    first_token = pieces[-1].next_token
    assert first_token is not None
    planes |= {name: damage(planes[name]) for name in damaged}
    answer = llama.decode(model, planes, first_token, NEW_TOKENS)
    assert answer != llama.reference(model, ids, 96, NEW_TOKENS)


@LENGTHS
def test_language_half_says_what_the_whole_model_says(tokens: int, piece_tokens: int) -> None:
    model = multimodal.build_model(1)
    prompt = multimodal.prompt(tokens, seed=2)
    pieces = list(multimodal.encode_in_pieces(model, prompt, piece_tokens))
    assert len(pieces) == -(-tokens // piece_tokens)
    assert [piece.aux["total_length"] for piece in pieces] == [tokens] * len(pieces)
    planes = joined(pieces, multimodal.planes(model))
    answer = multimodal.generate(model, planes, pieces[0].aux["position_delta"], NEW_TOKENS)
    assert answer == multimodal.reference(model, prompt, NEW_TOKENS)
    assert len(answer) == NEW_TOKENS


@pytest.mark.parametrize("damage", [np.zeros_like, swapped])
@pytest.mark.parametrize("damaged", ["embedding", "fill_ids", "mrope_positions", "deepstack"])
def test_damaged_plane_changes_the_tokens(
    damage: Callable[[NDArray[Any]], NDArray[Any]], damaged: str
) -> None:
    model = multimodal.build_model(1)
    prompt = multimodal.prompt(DAMAGED_PROMPT_TOKENS, seed=2)
    pieces = list(multimodal.encode_in_pieces(model, prompt, 96))
    planes = joined(pieces, multimodal.planes(model))
    planes[damaged] = damage(planes[damaged])
    answer = multimodal.generate(model, planes, pieces[0].aux["position_delta"], NEW_TOKENS)
    assert answer != multimodal.reference(model, prompt, NEW_TOKENS)


@pytest.mark.parametrize("layer", range(multimodal.DEEPSTACK_LAYERS))
def test_every_deepstack_layer_counts(layer: int) -> None:
    model = multimodal.build_model(1)
    prompt = multimodal.prompt(DAMAGED_PROMPT_TOKENS, seed=2)
    pieces = list(multimodal.encode_in_pieces(model, prompt, 96))
    planes = joined(pieces, multimodal.planes(model))
    planes["deepstack"] = planes["deepstack"].copy()
    np.split(planes["deepstack"], multimodal.DEEPSTACK_LAYERS, axis=1)[layer][:] = 0
    answer = multimodal.generate(model, planes, pieces[0].aux["position_delta"], NEW_TOKENS)
    assert answer != multimodal.reference(model, prompt, NEW_TOKENS)


def test_wrong_position_delta_changes_the_tokens() -> None:
    model = multimodal.build_model(1)
    prompt = multimodal.prompt(DAMAGED_PROMPT_TOKENS, seed=2)
    pieces = list(multimodal.encode_in_pieces(model, prompt, 96))
    planes = joined(pieces, multimodal.planes(model))
    assert pieces[0].aux["position_delta"] < 0, "no image in the prompt"
    answer = multimodal.generate(model, planes, 0, NEW_TOKENS)
    assert answer != multimodal.reference(model, prompt, NEW_TOKENS)
