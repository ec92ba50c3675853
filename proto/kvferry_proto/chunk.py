"""What travels on a data connection: a greeting, then chunks, each a header and its bytes.

The sink's daemon connects and shows its ticket; the source's daemon accepts and sends chunks.
All numbers are little-endian. A chunk is a 64-byte header, ``payload_bytes`` bytes, and, with
FLAG_CHECKSUM, the xxh3_64 of the payload in 8 bytes.
"""

import struct
import zlib
from typing import NamedTuple

HEADER_BYTES = GREETING_BYTES = 64
ACCEPT_BYTES = 16
TRAILER_BYTES = 8
TICKET_BYTES = 32
STREAM_VERSION = 1
FLAG_CHECKSUM = 1
PAYLOAD_BYTES_MAX = 1 << 34
TOKENS_MAX = 1 << 32

_HEADER = struct.Struct("<4sIQQQQ20x")
_GREETING = struct.Struct("<4sI32s20x")
_ACCEPT = struct.Struct("<4sI8x")
_CRC = struct.Struct("<I")
_TRAILER = struct.Struct("<Q")
_CHUNK_MAGIC, _GREETING_MAGIC, _ACCEPT_MAGIC = b"KVF1", b"KVFS", b"KVFA"


class BadChunk(Exception):
    """The other end sent what is no header, greeting or accept; the stream cannot go on."""


class ChunkHeader(NamedTuple):
    """Names the extent, and the transfer by the sink's own ``handle``."""

    handle: int
    first_token: int
    tokens: int
    payload_bytes: int
    has_checksum: bool

    def pack(self) -> bytes:
        """The 64 bytes."""
        flags = FLAG_CHECKSUM if self.has_checksum else 0
        return sealed(
            _HEADER.pack(
                _CHUNK_MAGIC,
                flags,
                self.handle,
                self.first_token,
                self.tokens,
                self.payload_bytes,
            )
        )


def read_header(data: bytes | bytearray) -> ChunkHeader:
    """Read a header; raise BadChunk if it is none."""
    check_seal(data)
    magic, flags, handle, first_token, tokens, payload_bytes = _HEADER.unpack(data[:60])
    if magic != _CHUNK_MAGIC or flags & ~FLAG_CHECKSUM:
        raise BadChunk(f"not a chunk header: magic {magic!r}, flags {flags:#x}")
    if not 0 < tokens <= TOKENS_MAX or not 0 < payload_bytes <= PAYLOAD_BYTES_MAX:
        raise BadChunk(f"a chunk of {tokens} tokens and {payload_bytes} bytes")
    return ChunkHeader(handle, first_token, tokens, payload_bytes, bool(flags & FLAG_CHECKSUM))


def pack_trailer(checksum: int) -> bytes:
    """The 8 bytes after a payload."""
    return _TRAILER.pack(checksum)


def pack_greeting(ticket: bytes) -> bytes:
    """What the sink's daemon sends first."""
    return sealed(_GREETING.pack(_GREETING_MAGIC, STREAM_VERSION, ticket))


def read_greeting(data: bytes) -> bytes:
    """Return the ticket; raise BadChunk if it is no greeting of a version we know."""
    check_seal(data)
    magic, version, ticket = _GREETING.unpack(data[:60])
    if magic != _GREETING_MAGIC or version != STREAM_VERSION:
        raise BadChunk(f"not a greeting: magic {magic!r}, version {version}")
    return bytes(ticket)


def pack_accept(accepted: bool) -> bytes:
    """What the source's daemon answers to a greeting."""
    return _ACCEPT.pack(_ACCEPT_MAGIC, 0 if accepted else 1)


def read_accept(data: bytes) -> bool:
    """Whether the ticket was good; raise BadChunk if it is no accept."""
    magic, status = _ACCEPT.unpack(data)
    if magic != _ACCEPT_MAGIC:
        raise BadChunk(f"not an accept: {magic!r}")
    return bool(status == 0)


def sealed(body: bytes) -> bytes:
    """60 bytes and their CRC."""
    return body + _CRC.pack(zlib.crc32(body))


def check_seal(data: bytes | bytearray) -> None:
    """Raise BadChunk for 64 bytes that are not as they were sealed."""
    if len(data) != HEADER_BYTES or _CRC.unpack(data[60:])[0] != zlib.crc32(data[:60]):
        raise BadChunk("the checksum of a header or greeting is wrong")
