"""Windows as arrays: numpy and torch over the pool's own memory, without a copy.

numpy has no bfloat16 and no float8: such planes are uint16 and uint8 arrays of their raw bits;
``torch_runs`` gives tensors of the true dtype.
"""

import mmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvferry_proto.layout import Dtype, Layout
from kvferry_proto.worker import PoolInfo

_NUMPY = {Dtype.BFLOAT16: "uint16", Dtype.FLOAT8_E4M3FN: "uint8", Dtype.FLOAT8_E5M2: "uint8"}


class Run(NamedTuple):
    """Neighbouring blocks of a window; the first one starts at token ``first_token``."""

    first_token: int
    first_block: int
    blocks: int


class Pool:
    """The daemon's pool, mapped into this process."""

    def __init__(self, info: PoolInfo, layout: Layout) -> None:
        """Map the file; OSError if it cannot be opened."""
        self.info = info
        self.layout = layout
        with open(info.path, "r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), info.blocks * info.block_bytes)

    def plane(self, name: str, run: Run) -> NDArray[Any]:
        """A plane over a run: (blocks, block_size_tokens, *shape), strided, writable, no copy."""
        index = next(i for i, plane in enumerate(self.layout.planes) if plane.name == name)
        plane, place = self.layout.planes[index], self.layout.places[index]
        dtype = np.dtype(_NUMPY.get(plane.dtype, plane.dtype.value))
        inner: list[int] = []
        step = dtype.itemsize
        for extent in reversed(plane.shape):
            inner.insert(0, step)
            step *= extent
        return np.ndarray(
            (run.blocks, self.layout.block_size_tokens, *plane.shape),
            dtype,
            self._mapping,
            run.first_block * self.layout.block_bytes + place.offset_bytes,
            (self.layout.block_bytes, place.token_bytes, *inner),
        )


class WindowView:
    """Tokens [first_token, first_token + tokens) of one transfer, where they lie.

    Valid until the transfer's next resume, release or end; then the blocks are another's.
    """

    def __init__(self, pool: Pool, first_token: int, tokens: int, runs: list[Run]) -> None:
        self._pool = pool
        self.first_token = first_token
        self.tokens = tokens
        self.runs = runs

    @property
    def end_token(self) -> int:
        """The first token behind the window."""
        return self.first_token + self.tokens

    def numpy_runs(self, plane: str) -> list[NDArray[Any]]:
        """One array a run, (blocks, block_size_tokens, *shape), no copy.

        Whole blocks: tokens outside of [first_token, end_token) hold nothing to be relied on.
        """
        return [self._pool.plane(plane, run) for run in self.runs]

    def torch_runs(self, plane: str) -> list[Any]:
        """The same as torch tensors of the plane's true dtype, no copy. Imports torch."""
        import torch

        true = getattr(torch, self._plane_dtype(plane).value)
        return [torch.from_numpy(array).view(true) for array in self.numpy_runs(plane)]

    def gather(self, plane: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copy the window's tokens of a plane into one array, (tokens, *shape).

        ``out``: the caller's array of that shape and dtype, filled and returned.
        """
        parts = list(self._pieces(plane, self.first_token, self.end_token))
        if out is None:
            array = self._pool.plane(plane, Run(0, 0, 1))
            out = np.empty((self.tokens, *array.shape[2:]), array.dtype)
        for first, part in parts:
            at = first - self.first_token
            out[at : at + len(part)] = part
        return out

    def scatter(self, plane: str, first_token: int, array: NDArray[Any]) -> None:
        """Copy (tokens, *shape) into the window from ``first_token`` on; ValueError if outside."""
        end = first_token + len(array)
        if first_token < self.first_token or end > self.end_token:
            raise ValueError(
                f"tokens [{first_token}, {end}) are not in [{self.first_token}, {self.end_token})"
            )
        for first, part in self._pieces(plane, first_token, end):
            at = first - first_token
            part[...] = array[at : at + len(part)]

    def _plane_dtype(self, name: str) -> Dtype:
        return next(p.dtype for p in self._pool.layout.planes if p.name == name)

    def _pieces(self, plane: str, first: int, end: int) -> Any:
        """Yield (token, array of neighbouring tokens) that cover [first, end) in order."""
        size = self._pool.layout.block_size_tokens
        for run in self.runs:
            low, high = max(first, run.first_token), min(end, run.first_token + run.blocks * size)
            if low >= high:
                continue
            blocks = self._pool.plane(plane, run)
            while low < high:
                block, inside = divmod(low - run.first_token, size)
                count = min(size - inside, high - low)
                yield low, blocks[block, inside : inside + count]
                low += count


def runs_of(base_tokens: int, block_size: int, runs: list[tuple[int, int]]) -> list[Run]:
    """A snapshot's runs with the token that each starts at."""
    found, token = [], base_tokens
    for first, blocks in runs:
        found.append(Run(token, first, blocks))
        token += blocks * block_size
    return found
