"""A tiny Qwen3-VL with random weights, split into the half that sees and the half that speaks.

The encode half turns a prompt with images into per-token arrays; the language half generates
from those arrays and two numbers, and never sees a pixel. As in ``llama``, nothing here knows
kvferry, and a few damaged tokens of thousands may leave the answer as it was: compare the bytes
of every plane too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

VOCABULARY_TOKENS = 1024
IMAGE_TOKEN, VIDEO_TOKEN, IMAGE_START, IMAGE_END = range(VOCABULARY_TOKENS - 4, VOCABULARY_TOKENS)
CONTEXT_TOKENS_MAX = 1 << 16
HIDDEN = 128
DEEPSTACK_LAYERS = 2
# One more: what is added after the last layer reaches no other token, and would be sent for nothing.
LANGUAGE_LAYERS = DEEPSTACK_LAYERS + 1
TEXT_RUN_TOKENS = 16  # between two images
# Patches (time, height, width). A token covers 2x2 of them: 24, 120, 80 and 384 tokens. None is
# square, so that height and width positions cannot be mistaken for each other.
IMAGE_GRIDS = ((1, 8, 12), (1, 24, 20), (1, 10, 32), (1, 48, 32))
MERGED_PATCHES = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text with images; the pixels are drawn from ``seed`` when an image is encoded."""

    ids: torch.Tensor  # (tokens,) int64; IMAGE_TOKEN where an image's features go
    grids: list[tuple[int, int, int]]  # patches (time, height, width) of each image, in order
    seed: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What the encoder has to send for tokens ``[first_token, first_token + len(array))``."""

    first_token: int
    arrays: dict[str, NDArray[Any]]  # per plane: (tokens, *per_token_shape), see ``planes``
    aux: dict[str, int]  # the same on every piece: known before the first image is encoded


def build_model(seed: int) -> Qwen3VLForConditionalGeneration:
    """Build the model; the same seed gives the same weights in every process."""
    config = Qwen3VLConfig(
        text_config=_text_config(),
        vision_config=_vision_config(),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers as they were
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.train(False).requires_grad_(False)
    for layer in model.model.language_model.layers:
        # Queries and keys are normed, so larger initial weights, which help a Llama, do nothing
        # here. With a norm weight of 1 attention is nearly flat: thousands of tokens blur into one
        # and the answer repeats itself whatever the planes hold.
        layer.self_attn.q_norm.weight.fill_(5.0)
    return model


def prompt(tokens: int, seed: int) -> Prompt:
    """Draw a prompt of ``tokens`` tokens: runs of text with images between, the rest text."""
    assert 0 < tokens <= CONTEXT_TOKENS_MAX
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE_TOKEN, (tokens,), generator=generator)
    grids = []
    first = TEXT_RUN_TOKENS
    for grid in cycle(IMAGE_GRIDS):
        image_tokens = _image_tokens(grid)
        last = first + 1 + image_tokens
        if last >= tokens:
            break
        ids[first], ids[first + 1 : last], ids[last] = IMAGE_START, IMAGE_TOKEN, IMAGE_END
        grids.append(grid)
        first = last + 1 + TEXT_RUN_TOKENS
    return Prompt(ids, grids, seed)


def planes(model: Qwen3VLForConditionalGeneration) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and per-token shape of every plane."""
    hidden = model.model.language_model.config.hidden_size
    deepstack_layers = len(model.model.visual.config.deepstack_visual_indexes)
    return [
        ("embedding", "float32", (hidden,)),
        ("fill_ids", "int64", ()),
        ("mrope_positions", "int64", (3,)),
        ("deepstack", "float32", (deepstack_layers * hidden,)),
    ]


def encode_in_pieces(
    model: Qwen3VLForConditionalGeneration, prompt: Prompt, piece_tokens: int
) -> Iterator[Piece]:
    """Encode piece by piece; an image is encoded when the first piece needs one of its tokens.

    Every piece carries the aux values ``total_length`` and ``position_delta``: how far the
    position after the prompt is from its length, as an image takes up fewer positions than tokens.
    """
    assert piece_tokens > 0
    positions, position_delta = _positions(model, prompt)
    aux = {"total_length": len(prompt.ids), "position_delta": position_delta}
    hidden = model.model.language_model.config.hidden_size
    deepstack_layers = len(model.model.visual.config.deepstack_visual_indexes)
    images = _images(model, prompt)
    # Features of encoded images not yet sent: (tokens, hidden + deepstack_layers * hidden).
    waiting = torch.empty(0, (1 + deepstack_layers) * hidden)
    for first in range(0, len(prompt.ids), piece_tokens):
        ids = prompt.ids[first : first + piece_tokens]
        visual = ids == IMAGE_TOKEN
        visual_tokens = int(visual.sum())
        while len(waiting) < visual_tokens:
            image, deepstack_of_image = next(images)
            waiting = torch.cat([waiting, torch.cat([image, *deepstack_of_image], dim=-1)])
        embedding = model.get_input_embeddings()(ids)
        embedding[visual] = waiting[:visual_tokens, :hidden]
        deepstack = torch.zeros(len(ids), deepstack_layers * hidden)
        deepstack[visual] = waiting[:visual_tokens, hidden:]
        waiting = waiting[visual_tokens:]
        arrays: dict[str, NDArray[Any]] = {
            "embedding": embedding.numpy(),
            "fill_ids": ids.numpy(),
            "mrope_positions": positions[first : first + piece_tokens].numpy(),
            "deepstack": deepstack.numpy(),
        }
        yield Piece(first, arrays, aux)


def generate(
    model: Qwen3VLForConditionalGeneration,
    planes: Mapping[str, NDArray[Any]],
    position_delta: int,
    new_tokens: int,
) -> list[int]:
    """Prefill the language model from the encoder's planes and generate ``new_tokens`` tokens.

    ``planes``: the four of ``planes(model)``, (total_length, *per_token_shape) each. They are
    copied, so their memory may be given back once this returns.
    """
    assert new_tokens > 0
    # Copies: torch warns of arrays that may not be written.
    arrays = {name: torch.from_numpy(np.array(plane)) for name, plane in planes.items()}
    visual = arrays["fill_ids"] == IMAGE_TOKEN
    deepstack_layers = len(model.model.visual.config.deepstack_visual_indexes)
    cache = DynamicCache(config=model.config)
    states = model.model.language_model(
        inputs_embeds=arrays["embedding"][None],
        position_ids=arrays["mrope_positions"].T[:, None],  # (3, 1, tokens)
        visual_pos_masks=visual[None],
        deepstack_visual_embeds=arrays["deepstack"][visual].chunk(deepstack_layers, dim=-1),
        cache=cache,
    ).last_hidden_state
    tokens = [_best(model, states)]
    while len(tokens) < new_tokens:
        states = model.model.language_model(
            input_ids=torch.tensor([tokens[-1:]]),
            position_ids=torch.full((3, 1, 1), cache.get_seq_length() + position_delta),
            cache=cache,
        ).last_hidden_state
        tokens.append(_best(model, states))
    return tokens


def reference(model: Qwen3VLForConditionalGeneration, prompt: Prompt, new_tokens: int) -> list[int]:
    """The tokens that ``generate`` must give, by transformers' own way through the whole model.

    It scatters the features, places the positions and advances them itself. Only the images are
    encoded one by one as the encoder does it: several at once would round differently.
    """
    assert new_tokens > 0
    model.model.rope_deltas = None  # what an earlier prompt left here would be used again
    inputs: dict[str, Any] = {"input_ids": prompt.ids[None]}
    if prompt.grids:
        images, deepstacks = zip(*_images(model, prompt), strict=True)
        # One tuple over the images, and one such per deepstack: what the types call a tensor.
        features: dict[str, Any] = {
            "pooler_output": images,
            "deepstack_features": list(zip(*deepstacks, strict=True)),
        }
        inputs["image_grid_thw"] = torch.tensor(prompt.grids)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithDeepstackFeatures(**features)}
    cache = DynamicCache(config=model.config)
    tokens: list[int] = []
    while len(tokens) < new_tokens:
        logits = model(**inputs, cache=cache, logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
        inputs = {"input_ids": torch.tensor([tokens[-1:]])}
    return tokens


def _text_config() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_TOKENS,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LANGUAGE_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT_TOKENS_MAX,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [6, 5, 5],  # time, height, width: half of head_dim together
            "mrope_interleaved": True,
        },
    }


def _vision_config() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": list(range(DEEPSTACK_LAYERS)),
    }


def _images(
    model: Qwen3VLForConditionalGeneration, prompt: Prompt
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Encode one image after the other: features (tokens, hidden), and one such per deepstack."""
    vision = model.model.visual.config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(prompt.seed)
    for grid in prompt.grids:
        patches = _image_tokens(grid) * MERGED_PATCHES
        pixels = torch.randn(patches, values, generator=generator)
        output = model.get_image_features(pixels, torch.tensor([grid]))
        yield output.pooler_output[0], [layer[0] for layer in output.deepstack_features]


def _image_tokens(grid: tuple[int, int, int]) -> int:
    time, height, width = grid
    return time * height * width // MERGED_PATCHES


def _positions(model: Qwen3VLForConditionalGeneration, prompt: Prompt) -> tuple[torch.Tensor, int]:
    """Time, height and width position of every token, (tokens, 3) int64, and their delta."""
    visual = (prompt.ids == IMAGE_TOKEN).int()
    grids = torch.tensor(prompt.grids).reshape(-1, 3)
    positions, delta = model.model.get_rope_index(prompt.ids[None], visual[None], grids)
    return positions[:, 0].T.contiguous(), int(delta)


def _best(model: Qwen3VLForConditionalGeneration, states: torch.Tensor) -> int:
    """The greedy token after ``states``: (1, tokens, hidden) float32."""
    return int(model.lm_head(states[0, -1]).argmax())
