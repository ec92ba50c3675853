"""Embeddings of unknown length, over two real daemons whose windows are smaller than any prompt."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvferry_client import FerryError, connect
from kvferry_client.embeddings import (
    Embeddings,
    embeddings_layout,
    receive_embeddings,
    send_embeddings,
)
from kvferry_proto.layout import Dtype
from live import BLOCK, WINDOW, LiveDaemon

HIDDEN, LAYERS = 8, 2
LAYOUT = embeddings_layout(HIDDEN, LAYERS, Dtype.FLOAT32, block_size_tokens=BLOCK)
TOKENS = 5 * WINDOW + 3


def encoded(tokens: int) -> Embeddings:
    """What tells token and place."""
    ids = np.arange(tokens)
    return Embeddings(
        embedding=np.outer(ids, np.arange(1, HIDDEN + 1)).astype(np.float32),
        fill_ids=ids,
        mrope_positions=np.stack([ids, 2 * ids, 3 * ids], axis=1),
        deepstack=np.outer(ids, np.arange(HIDDEN * LAYERS)).astype(np.float32),
    )


def cut(whole: Embeddings, size: int, fails_at: int | None = None) -> Iterator[Embeddings]:
    """Image by image."""
    for number, first in enumerate(range(0, len(whole.fill_ids), size)):
        if number == fails_at:
            raise OSError("no such image")
        yield Embeddings(*(array[first : first + size] for array in whole))


@pytest.mark.parametrize("tokens", [1, BLOCK, TOKENS])
def test_all_planes_arrive_window_by_window_and_the_length_comes_last(
    tmp_path: Path, tokens: int
) -> None:
    whole = encoded(tokens)
    with (
        LiveDaemon(tmp_path / "a") as a,
        LiveDaemon(tmp_path / "b") as b,
        connect(a.directory, LAYOUT, "encoder") as encoder,
        connect(b.directory, LAYOUT, "language") as language,
    ):
        args = (encoder, "t", cut(whole, 40), -7)
        sender = threading.Thread(target=send_embeddings, args=args)
        sender.start()
        with language.receive("t", source=a.address) as receiving:
            parts = list(receive_embeddings(receiving))
            assert receiving.aux == {"total_length": tokens, "position_delta": -7}
        assert receiving.aux is not None  # though it has been released
        sender.join()
        assert all(len(part.fill_ids) <= WINDOW for part in parts)
        for name, array in whole._asdict().items():
            arrived = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(arrived, array)
        a.wait_until_free()
        b.wait_until_free()


def test_an_image_that_cannot_be_encoded_ends_both_sides(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a") as a,
        LiveDaemon(tmp_path / "b") as b,
        connect(a.directory, LAYOUT, "encoder") as encoder,
        connect(b.directory, LAYOUT, "language") as language,
    ):
        with language.receive("t", source=a.address) as receiving:
            with pytest.raises(OSError, match="no such image"):
                send_embeddings(encoder, "t", cut(encoded(WINDOW), 20, fails_at=1), 0)
            with pytest.raises(FerryError, match="source_failed"):
                list(receive_embeddings(receiving))
        a.wait_until_free()
        b.wait_until_free()
