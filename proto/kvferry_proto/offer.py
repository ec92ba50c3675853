"""What travels on a data connection whose sink reads the blocks itself (transport nixl).

After the greeting of chunk.py, the source sends in any order: chunks, where a sink cannot read the
source's blocks as they are; a *pool* before the first offer from it; *offers*, which say in which
blocks of a pool the tokens lie; and *stood*, the answer to *read*, which the sink sends back when
it has read what was offered, or will not read it. Until `read` the source leaves the blocks as they
are; only after `stood` does the sink count the tokens. The sink's last word is *bye*: it reads
nothing more that was offered here.

Every frame is 64 bytes, little-endian, sealed as a chunk's header is; a pool's and an offer's body
follows it.
"""

import struct
from typing import NamedTuple

from kvferry_proto.chunk import TOKENS_MAX, BadChunk, check_seal, sealed
from kvferry_proto.layout import BLOCK_BYTES_MAX
from kvferry_proto.worker import WINDOW_BLOCKS_MAX

FRAME_BYTES = 64
METADATA_BYTES_MAX = 1 << 20
POOL_BLOCKS_MAX = 1 << 22  # who reads there keeps 24 bytes of each
RUN_BYTES = 16
HOST = 0  # as a device: DRAM; a CUDA device's index is one less than what stands there

_POOL = struct.Struct("<4sIQQQQ20x")  # magic, device, number, address, block_bytes, blocks
_SIZE = struct.Struct("<I")  # at offset 40: bytes of the metadata
_OFFER = struct.Struct("<4sIQQQQ20x")  # magic, runs, handle, first_token, tokens, pool
_WORD = struct.Struct("<4s4xQQ36x")  # magic, handle, first_token
_RUN = struct.Struct("<QQ")
_POOL_MAGIC, _OFFER_MAGIC = b"KVFP", b"KVFO"
_READ_MAGIC, _STOOD_MAGIC, _BYE_MAGIC = b"KVFR", b"KVFN", b"KVFB"
Runs = tuple[tuple[int, int], ...]  # (first_block, blocks)


class PoolFrame(NamedTuple):
    """A pool of the source, as its NIXL agent registered it; ``number`` names it in offers."""

    number: int
    device: int
    address: int
    block_bytes: int
    blocks: int
    metadata: bytes

    def pack(self) -> bytes:
        """The frame and its body."""
        head = bytearray(
            _POOL.pack(
                _POOL_MAGIC, self.device, self.number, self.address, self.block_bytes, self.blocks
            )
        )
        _SIZE.pack_into(head, 40, len(self.metadata))
        return sealed(bytes(head)) + self.metadata


class OfferFrame(NamedTuple):
    """The blocks in which an extent lies, whole and in token order."""

    handle: int
    first_token: int
    tokens: int
    pool: int
    runs: Runs

    def pack(self) -> bytes:
        """The frame and its body."""
        head = _OFFER.pack(
            _OFFER_MAGIC,
            len(self.runs),
            self.handle,
            self.first_token,
            self.tokens,
            self.pool,
        )
        return sealed(head) + b"".join([_RUN.pack(*run) for run in self.runs])


class ReadFrame(NamedTuple):
    """Sink to source: the offered blocks are not read (any more)."""

    handle: int
    first_token: int

    def pack(self) -> bytes:
        """The frame."""
        return sealed(_WORD.pack(_READ_MAGIC, *self))


class StoodFrame(NamedTuple):
    """Source to sink: what was read there is what was offered."""

    handle: int
    first_token: int

    def pack(self) -> bytes:
        """The frame."""
        return sealed(_WORD.pack(_STOOD_MAGIC, *self))


class ByeFrame(NamedTuple):
    """Sink to source: nothing that was offered on this connection is read any more."""

    def pack(self) -> bytes:
        """The frame."""
        return sealed(_WORD.pack(_BYE_MAGIC, 0, 0))


Frame = PoolFrame | OfferFrame | ReadFrame | StoodFrame | ByeFrame


def read_frame(data: bytes | bytearray) -> tuple[Frame, int] | None:
    """A frame without its body, and the body's size; None for what may be a chunk's header.

    Raises BadChunk for what is neither, or is beyond our limits.
    """
    check_seal(data)
    magic = bytes(data[:4])
    if magic == _POOL_MAGIC:
        return _read_pool(data)
    if magic == _OFFER_MAGIC:
        return _read_offer(data)
    if magic not in (_READ_MAGIC, _STOOD_MAGIC, _BYE_MAGIC):
        return None
    _, handle, first_token = _WORD.unpack(data[:60])
    if magic == _READ_MAGIC:
        return ReadFrame(handle, first_token), 0
    if magic == _STOOD_MAGIC:
        return StoodFrame(handle, first_token), 0
    return ByeFrame(), 0


def _read_pool(data: bytes | bytearray) -> tuple[Frame, int]:
    _, device, number, address, block_bytes, blocks = _POOL.unpack(data[:60])
    (size,) = _SIZE.unpack_from(data, 40)
    if not 0 < block_bytes <= BLOCK_BYTES_MAX or not 0 < blocks <= POOL_BLOCKS_MAX:
        raise BadChunk(f"a pool of {blocks} blocks of {block_bytes} bytes")
    if address + block_bytes * blocks > 1 << 63:
        raise BadChunk(f"a pool at {address:#x}")
    if not 0 < size <= METADATA_BYTES_MAX:
        raise BadChunk(f"{size} bytes of metadata")
    return PoolFrame(number, device, address, block_bytes, blocks, b""), size


def _read_offer(data: bytes | bytearray) -> tuple[Frame, int]:
    _, runs, handle, first_token, tokens, pool = _OFFER.unpack(data[:60])
    if not 0 < runs <= WINDOW_BLOCKS_MAX or not 0 < tokens <= TOKENS_MAX:
        raise BadChunk(f"an offer of {tokens} tokens in {runs} runs")
    return OfferFrame(handle, first_token, tokens, pool, ()), runs * RUN_BYTES


def read_runs(body: bytes | bytearray, blocks: int) -> Runs:
    """The runs of an offer from a pool of so many blocks; raise BadChunk for any outside of it."""
    runs = tuple(_RUN.iter_unpack(body))
    for first, count in runs:
        if count < 1 or first + count > blocks:
            raise BadChunk(f"blocks {first} to {first + count} of a pool of {blocks}")
    return runs
