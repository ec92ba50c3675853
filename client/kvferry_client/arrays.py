"""Arrays as the planes have them: the right dtype and shape, or a clear refusal.

numpy would cast and broadcast in silence: 1.5 into a plane of raw bfloat16 bits would become 1.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Plane

LINE_BYTES = 64
# numpy has no such types: their raw bits. In torch's words: what a tensor is looked at as.
_RAW = {Dtype.BFLOAT16: "uint16", Dtype.FLOAT8_E4M3FN: "uint8", Dtype.FLOAT8_E5M2: "uint8"}


def numpy_dtype(plane: Plane) -> np.dtype[Any]:
    """The dtype of a plane's numpy arrays."""
    return np.dtype(_RAW.get(plane.dtype, plane.dtype.value))


def empty_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A new array that begins at a cache line, as torch's do.

    numpy's own large ones begin 16 bytes into one: then every store lies across two, and copies of
    a few 100 KiB from a pool run at half the speed (docs/performance.md).
    """
    size_bytes = prod(shape) * dtype.itemsize
    raw = np.empty(size_bytes + LINE_BYTES, np.uint8)
    first = -raw.ctypes.data % LINE_BYTES
    return raw[first : first + size_bytes].view(dtype).reshape(shape)


def dtype_names(plane: Plane) -> list[str]:
    """What an array or tensor of a plane may call its dtype: the true one, or the raw bits."""
    return sorted({plane.dtype.value, _RAW.get(plane.dtype, plane.dtype.value)})


class Bits:
    """An array's memory as numpy has it (or a GPU's tensor), and what its owner calls its dtype."""

    def __init__(self, array: Any, dtype: str) -> None:
        self.array = array
        self.dtype = dtype


def bits_of(array: Any) -> Bits:
    """Look at a numpy array, or at a torch CPU tensor without a copy."""
    if isinstance(array, np.ndarray):
        return Bits(array, array.dtype.name)
    if type(array).__module__.partition(".")[0] != "torch":
        raise FerryError(
            Code.BAD_ARRAY, f"a numpy array or torch tensor is needed, not {type(array).__name__}"
        )
    import torch

    if array.device.type != "cpu":
        raise FerryError(Code.BAD_ARRAY, f"a tensor on the CPU is needed, not on {array.device}")
    name = str(array.dtype).removeprefix("torch.")
    raw = _RAW.get(Dtype(name)) if name in Dtype.__members__.values() else None
    if raw is None:
        return Bits(array.detach().numpy(), name)
    as_ints = array.detach().view(torch.int16 if raw == "uint16" else torch.uint8)
    return Bits(as_ints.numpy().view(raw), name)


def checked(bits: Bits, plane: Plane, tokens: int | None = None) -> Any:
    """The array, if it is (tokens, *shape) of the plane's dtype; else FerryError(bad_array)."""
    array = bits.array
    names = dtype_names(plane)
    shape_fits = array.ndim == 1 + len(plane.shape) and array.shape[1:] == plane.shape
    if bits.dtype not in names or not shape_fits or tokens not in (None, len(array)):
        wanted = ("tokens" if tokens is None else tokens, *plane.shape)
        raise FerryError(
            Code.BAD_ARRAY,
            f"plane {plane.name!r} takes {' or '.join(names)} of shape "
            f"({', '.join(map(str, wanted))}), not {bits.dtype} of {tuple(array.shape)}",
        )
    return array
