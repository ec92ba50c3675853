"""What a payload is made of: planes of per-token arrays, aux values, and the block they share.

A block holds ``block_size_tokens`` tokens of every plane, one plane after the other, each plane
starting at a multiple of 64 bytes and C-contiguous: as ``(block_size_tokens, *shape)``, or, if its
order is HND, as ``(shape[0], block_size_tokens, *shape[1:])``.
"""

import hashlib
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kvferry_proto.fields import STR, Name

ALIGN_BYTES = 64  # a cache line; also what vectorised copies like
PLANES_MAX = 1024
BLOCK_BYTES_MAX = 1 << 32
STRIPS_MAX = 1 << 16  # a part of a block is a piece a strip
Extent = Annotated[int, Field(ge=1, le=1 << 24)]


class Dtype(StrEnum):
    """Element types, by torch's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return _ELEMENT_BYTES[self]


_ELEMENT_BYTES = {
    Dtype.BFLOAT16: 2,
    Dtype.FLOAT16: 2,
    Dtype.FLOAT32: 4,
    Dtype.FLOAT64: 8,
    Dtype.FLOAT8_E4M3FN: 1,
    Dtype.FLOAT8_E5M2: 1,
    Dtype.INT8: 1,
    Dtype.INT16: 2,
    Dtype.INT32: 4,
    Dtype.INT64: 8,
    Dtype.UINT8: 1,
    Dtype.BOOL: 1,
}


class Order(StrEnum):
    """How a plane lies in a block: its tokens outermost, or its first axis, mostly heads."""

    NHD = "NHD"
    HND = "HND"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Plane(_Part):
    """One per-token array: ``shape`` is the shape of one token, ``()`` for a scalar.

    Every rank of a group has the same planes. ``heads_total`` is None if they hold the same bytes
    too. Else ``shape[0]`` counts the heads that one rank has of so many: see ``first_head``.
    """

    name: Name
    dtype: Annotated[Dtype, Field(strict=False), STR]
    shape: Annotated[tuple[Extent, ...], Field(max_length=8, strict=False)] = ()
    heads_total: Extent | None = None
    order: Annotated[Order, Field(strict=False), STR] = Order.NHD

    @model_validator(mode="after")
    def _heads_are_there(self) -> "Plane":
        if self.order is Order.HND and not self.shape:
            raise ValueError(f"plane {self.name!r} has the order HND and no axis")
        if self.heads_total is None:
            return self
        if not self.shape:
            raise ValueError(f"plane {self.name!r} has {self.heads_total} heads and no axis")
        if self.heads_total % self.shape[0]:  # whatever the number of ranks
            raise ValueError(
                f"plane {self.name!r} has {self.shape[0]} of {self.heads_total} heads: no even share"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later and says nothing: older digests, frames, ledgers stay true."""
        fields: dict[str, Any] = write(self)
        if self.heads_total is None:
            fields.pop("heads_total", None)
        if self.order is Order.NHD:
            fields.pop("order", None)
        return fields

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token in this plane."""
        return prod(self.shape) * self.dtype.element_bytes

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one token in one entry of the first axis; of a scalar's token."""
        return prod(self.shape[1:]) * self.dtype.element_bytes

    def first_head(self, rank: int, ranks: int) -> int:
        """The first of the ``shape[0]`` heads that a rank has; above one rank a head, its only one."""
        return rank * (self.heads_total or 0) // ranks


class PlanePlace(NamedTuple):
    """Where a plane, or a strip of one, lies in every block."""

    offset_bytes: int
    token_bytes: int


class Layout(_Part):
    """The planes and aux names of a payload, and how many tokens a block holds."""

    planes: Annotated[tuple[Plane, ...], Field(min_length=1, max_length=PLANES_MAX, strict=False)]
    aux: Annotated[tuple[Name, ...], Field(max_length=64, strict=False)] = ()
    block_size_tokens: Annotated[int, Field(ge=1, le=1 << 16)] = 128

    @model_validator(mode="after")
    def _names_are_single_and_blocks_bounded(self) -> "Layout":
        for names in ([plane.name for plane in self.planes], list(self.aux)):
            if len(set(names)) != len(names):
                raise ValueError(f"a name stands twice in {names}")
        strips = sum(plane.shape[0] for plane in self.planes if plane.order is Order.HND)
        if strips > STRIPS_MAX:
            raise ValueError(f"HND planes have {strips} heads in all, over {STRIPS_MAX}")
        if self.block_bytes > BLOCK_BYTES_MAX:
            raise ValueError(f"a block of {self.block_bytes} bytes is over {BLOCK_BYTES_MAX}")
        return self

    @cached_property
    def places(self) -> tuple[PlanePlace, ...]:
        """Offset and token size of every plane within a block, in plane order."""
        places, offset_bytes = [], 0
        for plane in self.planes:
            places.append(PlanePlace(offset_bytes, plane.token_bytes))
            offset_bytes += _aligned(plane.token_bytes * self.block_size_tokens)
        return tuple(places)

    @cached_property
    def strips(self) -> tuple[PlanePlace, ...]:
        """As ``places``, but an HND plane is one strip a head: in a strip, tokens are neighbours."""
        strips = []
        for plane, place in zip(self.planes, self.places, strict=True):
            heads = plane.shape[0] if plane.order is Order.HND else 1
            row_bytes = plane.token_bytes // heads
            for head in range(heads):
                offset_bytes = place.offset_bytes + head * row_bytes * self.block_size_tokens
                strips.append(PlanePlace(offset_bytes, row_bytes))
        return tuple(strips)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block, padding included."""
        last = self.places[-1]
        return _aligned(last.offset_bytes + last.token_bytes * self.block_size_tokens)

    @cached_property
    def token_bytes(self) -> int:
        """Payload bytes of one token over all planes, without padding."""
        return sum(plane.token_bytes for plane in self.planes)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that are equal exactly for equal layouts."""
        return hashlib.sha256(self.model_dump_json().encode()).digest()[:16]

    def first_difference(self, other: "Layout") -> str | None:
        """Name the first field in which the two differ, with both values; None when equal."""
        if self.block_size_tokens != other.block_size_tokens:
            return f"block_size_tokens: {self.block_size_tokens} and {other.block_size_tokens}"
        for index, (mine, theirs) in enumerate(zip(self.planes, other.planes, strict=False)):
            for field in ("name", "dtype", "shape", "heads_total", "order"):
                one, two = getattr(mine, field), getattr(theirs, field)
                if one != two:
                    return f"planes[{index}] ({mine.name}) {field}: {one} and {two}"
        if len(self.planes) != len(other.planes):
            return f"number of planes: {len(self.planes)} and {len(other.planes)}"
        if self.aux != other.aux:
            return f"aux: {list(self.aux)} and {list(other.aux)}"
        return None


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
