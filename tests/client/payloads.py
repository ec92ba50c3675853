"""A layout of three kinds of planes, and payloads whose bytes all differ."""

from collections.abc import Iterator

import numpy as np

from kvferry_client import Dtype, Layout, Plane
from live import LiveDaemon

Daemons = tuple[LiveDaemon, LiveDaemon]  # a source's and a sink's

BLOCK, WINDOW = 16, 64
LAYOUT = Layout(
    planes=(
        Plane(name="k", dtype=Dtype.FLOAT32, shape=(2, 3)),
        Plane(name="bf", dtype=Dtype.BFLOAT16, shape=(4,)),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    aux=("first_token",),
    block_size_tokens=BLOCK,
)


def payload(tokens: int) -> dict[str, np.ndarray]:
    """Different bytes for every token and plane."""
    rng = np.random.default_rng(tokens)
    return {
        "k": rng.standard_normal((tokens, 2, 3), dtype=np.float32),
        "bf": rng.integers(0, 1 << 15, (tokens, 4), dtype=np.uint16),
        "ids": np.arange(tokens, dtype=np.int64),
    }


def pieces(arrays: dict[str, np.ndarray], size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Pieces of ``size`` tokens."""
    for first in range(0, len(arrays["ids"]), size):
        yield first, {name: array[first : first + size] for name, array in arrays.items()}
