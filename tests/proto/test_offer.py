"""Frames of a connection whose sink reads blocks itself."""

import pytest

from kvferry_proto.chunk import BadChunk, ChunkHeader
from kvferry_proto.offer import (
    FRAME_BYTES,
    METADATA_BYTES_MAX,
    ByeFrame,
    Frame,
    OfferFrame,
    PoolFrame,
    ReadFrame,
    StoodFrame,
    read_frame,
    read_runs,
)

BIG = (1 << 63) - 1
POOL = PoolFrame(7, 0, 1 << 47, 4096, 10, b"metadata")
OFFER = OfferFrame(BIG, BIG, 1 << 32, 7, ((3, 2), (9, 1)))


@pytest.mark.parametrize(
    ("frame", "golden"),
    [
        (ReadFrame(1, 2), "4b564652" + "00000000" + "0100000000000000" + "0200000000000000"),
        (StoodFrame(1, 2), "4b56464e" + "00000000" + "0100000000000000" + "0200000000000000"),
        (ByeFrame(), "4b564642" + "00" * 20),
        (
            OfferFrame(1, 2, 3, 4, ((5, 6),)),
            "4b56464f" + "01000000" + "".join(f"{n:02x}00000000000000" for n in (1, 2, 3, 4)),
        ),
        (
            PoolFrame(1, 2, 3, 4, 5, b"m"),
            "4b564650"
            + "02000000"
            + "".join(f"{n:02x}00000000000000" for n in (1, 3, 4, 5))
            + "01000000",
        ),
    ],
)
def test_a_frame_is_these_bytes(frame: Frame, golden: str) -> None:
    packed = frame.pack()[: FRAME_BYTES - 4]
    assert packed.hex() == golden + "00" * (FRAME_BYTES - 4 - len(golden) // 2)


@pytest.mark.parametrize("frame", [ReadFrame(BIG, 0), StoodFrame(0, BIG), ByeFrame()])
def test_a_word_is_read_as_it_was_written(frame: Frame) -> None:
    assert read_frame(frame.pack()) == (frame, 0)


def test_what_has_a_body_says_how_large_it_is() -> None:
    packed = POOL.pack()
    assert read_frame(packed[:FRAME_BYTES]) == (POOL._replace(metadata=b""), 8)
    assert packed[FRAME_BYTES:] == POOL.metadata
    packed = OFFER.pack()
    assert read_frame(packed[:FRAME_BYTES]) == (OFFER._replace(runs=()), 32)
    assert read_runs(packed[FRAME_BYTES:], 11) == OFFER.runs


def test_a_chunk_is_left_to_its_own_reader() -> None:
    assert read_frame(ChunkHeader(1, 0, 4, 64, has_checksum=True).pack()) is None


@pytest.mark.parametrize(
    "frame",
    [
        POOL._replace(blocks=0),
        POOL._replace(blocks=1 << 40),
        POOL._replace(block_bytes=0),
        POOL._replace(block_bytes=1 << 40),
        POOL._replace(metadata=b""),
        POOL._replace(metadata=bytes(METADATA_BYTES_MAX + 1)),
        OFFER._replace(runs=()),
        OFFER._replace(tokens=0),
        OFFER._replace(tokens=(1 << 32) + 1),
        OFFER._replace(runs=((0, 1),) * ((1 << 15) + 1)),
    ],
)
def test_a_frame_beyond_the_limits_is_refused(frame: Frame) -> None:
    with pytest.raises(BadChunk):
        read_frame(frame.pack()[:FRAME_BYTES])


@pytest.mark.parametrize("at", [0, 5, 20, 59, 63])
def test_a_damaged_frame_is_refused(at: int) -> None:
    damaged = bytearray(ReadFrame(1, 2).pack())
    damaged[at] ^= 1
    with pytest.raises(BadChunk):
        read_frame(damaged)


@pytest.mark.parametrize("run", [(10, 1), (0, 11), (9, 2), (3, 0), ((1 << 64) - 1, 1)])
def test_blocks_outside_of_the_pool_are_refused(run: tuple[int, int]) -> None:
    body = OFFER._replace(runs=((0, 10), run)).pack()[FRAME_BYTES:]
    with pytest.raises(BadChunk):
        read_runs(body, 10)
