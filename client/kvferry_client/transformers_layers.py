"""What the layers of a transformers cache hold, and how an empty one is given its tokens.

A layer has keys and values of (1, heads, tokens, dim), and four classes keep them in different
ways. A dynamic layer has every token, a static one has room behind them. A sliding one has the
last of them only, and how many there were is a number beside: without it the next token gets a
wrong position. With MLA the keys are the latent and the values the rope part, of other shapes.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache, cache_utils

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Order, Plane

KNOWN_VERSIONS = ("5.24",)  # whose caches were tried: we set what `update` leaves behind
_PLANE = re.compile(r"layer\.(\d+)\.([kv])(?:\.last(\d+))?")


class Named(NamedTuple):
    """What a plane's name says: the tokens of a layer, or only the last of them."""

    layer: int
    part: str  # k or v
    last_tokens: int | None

    def __str__(self) -> str:
        last = "" if self.last_tokens is None else f".last{self.last_tokens}"
        return f"layer.{self.layer}.{self.part}{last}"

    @classmethod
    def of(cls, name: str) -> "Named":
        """Read a name; FerryError(layout_mismatch) if it is not of a transformers cache."""
        found = _PLANE.fullmatch(name)
        if found is None:
            raise FerryError(Code.LAYOUT_MISMATCH, f"plane {name!r} is not of a transformers cache")
        layer, part, last = found.groups()
        return cls(int(layer), part, None if last is None else int(last))


class Held(NamedTuple):
    """The tokens that a layer has of one plane, where they lie: (tokens, heads, dim)."""

    first_token: int
    rows: Tensor


def require_known(version: str) -> None:
    """FerryError(engine_unsupported) for a transformers whose caches nobody has tried."""
    if ".".join(version.split(".")[:2]) not in KNOWN_VERSIONS:
        raise FerryError(
            Code.ENGINE_UNSUPPORTED,
            f"transformers {version} is installed; its caches are known of "
            f"{' and '.join(KNOWN_VERSIONS)}",
        )


def empty_cache(config: Any, max_cache_len: int | None) -> Any:
    """A cache as the model makes it, static if it has a length; FerryError if it is of no use."""
    require_known(transformers.__version__)
    cache: Any
    if max_cache_len is None:
        cache = DynamicCache(config=config)
    else:
        cache = StaticCache(config=config, max_cache_len=max_cache_len)
    check_kinds(cache)
    return cache


def planes_of(config: Any, dtype: torch.dtype | None) -> list[Plane]:
    """The planes of a model's cache: k and v of every layer that keeps any."""
    decoder = config.get_text_config(decoder=True)
    dtype = dtype or decoder.dtype or torch.get_default_dtype()
    planes = []
    for index, layer in _keeping(empty_cache(config, None)):
        last = layer.sliding_window - 1 if layer.is_sliding else None
        for part, shape in zip("kv", _shapes(decoder.per_layer_config[index]), strict=True):
            planes.append(_plane(Named(index, part, last), dtype, shape))
    return planes


def _shapes(config: Any) -> list[tuple[int, int]]:
    """(heads, dim) of a layer's keys and values."""
    latent_dim = getattr(config, "kv_lora_rank", None)
    if latent_dim is not None:
        return [(1, latent_dim), (1, config.qk_rope_head_dim)]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(heads, head_dim)] * 2


def _plane(name: Named, dtype: torch.dtype, shape: tuple[int, ...]) -> Plane:
    """A plane with its heads outermost in a block, as transformers has them."""
    word = str(dtype).removeprefix("torch.")
    if word not in Dtype.__members__.values():
        raise FerryError(Code.BAD_CACHE, f"{name} is of {word}, which no plane can have")
    return Plane(name=str(name), dtype=Dtype(word), shape=shape, order=Order.HND)


def check_kinds(cache: Any) -> None:
    """FerryError(bad_cache) for a cache that keeps more, or other things, than its tokens."""
    if type(cache) not in (DynamicCache, StaticCache):
        raise FerryError(Code.BAD_CACHE, f"a {type(cache).__name__} is not taken")
    if cache.offloading:
        raise FerryError(Code.BAD_CACHE, "a cache that offloads its layers is not taken")
    known = (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        cache_utils.StaticLayer,
        cache_utils.StaticSlidingWindowLayer,
        cache_utils.DummyLayer,
    )
    for index, layer in enumerate(cache.layers):
        if type(layer) not in known:
            raise FerryError(
                Code.BAD_CACHE, f"layer {index} is a {type(layer).__name__}, which is not taken"
            )


def check_fits(cache: Any, layout: Layout) -> None:
    """FerryError names the first thing in which a cache that has tokens is not of the layout."""
    last_tokens = {(n.layer, n.part): n.last_tokens for n in names_of(layout)}
    found = []
    for index, layer in _keeping(cache):
        if layer.keys.shape[0] != 1:
            raise FerryError(
                Code.BAD_CACHE, f"the cache is of a batch of {layer.keys.shape[0]}, not of 1"
            )
        for part, tensor in (("k", layer.keys), ("v", layer.values)):
            name = Named(index, part, last_tokens.get((index, part)))
            found.append(_plane(name, tensor.dtype, (tensor.shape[1], tensor.shape[3])))
    difference = layout.first_difference(layout.model_copy(update={"planes": tuple(found)}))
    if difference is not None:
        raise FerryError(Code.LAYOUT_MISMATCH, f"the layout and the cache differ: {difference}")
    for name in names_of(layout):
        tokens = int(cache.layers[name.layer].get_seq_length())
        needed = 0 if name.last_tokens is None else max(tokens - name.last_tokens, 0)
        first, _ = held(cache.layers[name.layer], name.part)
        if first > needed:
            raise FerryError(
                Code.LAYOUT_MISMATCH,
                f"{name} needs token {needed}, and the cache begins at {first}",
            )


def names_of(layout: Layout) -> list[Named]:
    """What the planes are of; FerryError(layout_mismatch) if they are not of such a cache."""
    return [Named.of(plane.name) for plane in layout.planes]


def tokens_of(cache: Any) -> int:
    """How many tokens a cache has had; FerryError(bad_cache) if its layers differ."""
    check_kinds(cache)
    tokens = [int(layer.get_seq_length()) for _, layer in _keeping(cache)]
    if len(set(tokens)) > 1:
        raise FerryError(Code.BAD_CACHE, f"the layers have {min(tokens)} to {max(tokens)} tokens")
    return tokens[0] if tokens else 0


def _keeping(cache: Any) -> list[tuple[int, Any]]:
    """The layers that keep tokens, with their numbers; the others look at one of these."""
    return [
        (index, layer)
        for index, layer in enumerate(cache.layers)
        if type(layer) is not cache_utils.DummyLayer
    ]


def held(layer: Any, part: str) -> Held:
    """The tokens that a layer has, without a copy: the last ones, from its first row on."""
    tensor = (layer.keys if part == "k" else layer.values)[0]
    tokens = int(layer.get_seq_length())
    count = min(tokens, tensor.shape[1])
    return Held(tokens - count, tensor[:, :count].transpose(0, 1))


def filled(
    config: Any, max_cache_len: int | None, tokens: int, rows: Callable[[int, str], Tensor]
) -> Any:
    """A cache of so many tokens; ``rows`` gives (heads, rows, dim), the last ones of a layer's part.

    Each is asked for once, and kept as it is where a layer is dynamic and it is contiguous.
    """
    cache = empty_cache(config, max_cache_len)
    for index, layer in _keeping(cache) if tokens else []:
        _fill(layer, rows(index, "k"), rows(index, "v"), tokens)
    return cache


def _fill(layer: Any, keys: Tensor, values: Tensor, tokens: int) -> None:
    """Leave an empty layer as ``update`` would have, had it had all tokens."""
    if type(layer) is cache_utils.StaticSlidingWindowLayer:
        # A full one has a row, too, for the token that leaves when the next one comes.
        spare = max(min(tokens, layer.max_cache_len) - keys.shape[1], 0)
        layer.update(_behind(spare, keys), _behind(spare, values))
        layer.cumulative_length_int = tokens
    elif type(layer) is cache_utils.StaticLayer:
        layer.update(keys[None], values[None])
    else:  # ``update`` would copy them
        layer.lazy_initialization(keys[None], values[None])
        layer.keys, layer.values = keys[None].contiguous(), values[None].contiguous()
        if layer.is_sliding:
            layer.cumulative_length = tokens


def _behind(spare: int, rows: Tensor) -> Tensor:
    """Rows behind so many empty ones, as a batch."""
    heads, _, dim = rows.shape
    return torch.cat([rows.new_zeros(heads, spare, dim), rows], dim=1)[None]
