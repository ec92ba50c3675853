"""Embeddings of a prompt with images, from an encoder to a language model, of unknown length.

An encoder's server knows how long a prompt has become once it has encoded the last image; the
language model's holds a window, and takes over what is there. Neither allocates for the whole.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kvferry_client.sync import Client, Receiving
from kvferry_proto.layout import Dtype, Layout, Plane

AUX = ("total_length", "position_delta")


class Embeddings(NamedTuple):
    """Some tokens of a prompt, all arrays numpy's or torch's."""

    embedding: Any  # (tokens, hidden): of text as of images
    fill_ids: Any  # (tokens,) int64: the prompt with placeholders filled in
    mrope_positions: Any  # (tokens, 3) int64: time, height and width
    deepstack: Any  # (tokens, deepstack_layers * hidden): zero where there is no image


def embeddings_layout(
    hidden: int, deepstack_layers: int, dtype: Dtype, *, block_size_tokens: int = 128
) -> Layout:
    """The layout of such payloads. ``deepstack_layers``: whose features are added later, one or more."""
    planes = (
        Plane(name="embedding", dtype=dtype, shape=(hidden,)),
        Plane(name="fill_ids", dtype=Dtype.INT64),
        Plane(name="mrope_positions", dtype=Dtype.INT64, shape=(3,)),
        Plane(name="deepstack", dtype=dtype, shape=(deepstack_layers * hidden,)),
    )
    return Layout(planes=planes, aux=AUX, block_size_tokens=block_size_tokens)


def send_embeddings(
    client: Client,
    transfer_id: str,
    pieces: Iterable[Embeddings],
    position_delta: int,
    *,
    attempt: int = 0,
) -> int:
    """Send pieces as they are encoded, waiting for room; how many tokens there were.

    ``position_delta``: from the number of tokens to the position behind them. An exception of
    ``pieces``, as of a failed image, aborts both sides.
    """
    tokens = 0
    with client.send(transfer_id, attempt=attempt) as sending:
        for piece in pieces:
            sending.fill(tokens, piece._asdict())
            tokens += len(piece.fill_ids)
        sending.finish(aux={"total_length": tokens, "position_delta": position_delta})
    return tokens


def receive_embeddings(receiving: Receiving) -> Iterator[Embeddings]:
    """Copies of windows as they arrive; after the last one ``receiving.aux`` has the values."""
    for window in receiving:
        arrays = (np.array(window.gather(name)) for name in Embeddings._fields)
        yield Embeddings(*arrays)
