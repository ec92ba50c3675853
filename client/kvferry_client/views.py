"""Windows as arrays: numpy and torch over the pool's own memory, without a copy.

What lies in a GPU's memory has tensors only (``device.py``), and work that is under way: ``ready``,
``resume`` and ``release`` wait for what the calling thread's current stream has been given so far.
Who works on another stream makes that the current one around these calls.

numpy has no bfloat16 and no float8: such planes are uint16 and uint8 arrays of their raw bits;
``torch_runs`` gives tensors of the true dtype.
"""

import mmap
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvferry_client.arrays import bits_of, checked, empty_array, numpy_dtype
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout, Order, Plane, PlanePlace
from kvferry_proto.worker import PoolInfo


class Run(NamedTuple):
    """Neighbouring blocks of a window; the first one starts at token ``first_token``."""

    first_token: int
    first_block: int
    blocks: int


class GpuWork:
    """Work that a GPU has been given and may not have done yet; its waiting holds no GIL."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Until it is done; FerryError(device_failed) if the GPU failed."""
        try:
            self._wait()
        except RuntimeError as error:
            raise FerryError(
                Code.DEVICE_FAILED, f"in this worker, which must be started again: {error}"
            ) from error


class _Found(NamedTuple):
    """A plane, and where it lies in a block."""

    plane: Plane
    place: PlanePlace


class Pool:
    """The daemon's pool, mapped into this process."""

    def __init__(self, info: PoolInfo, layout: Layout) -> None:
        """Map the file; OSError if it cannot be opened."""
        self.info = info
        self.layout = layout
        with open(info.path, "r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), info.blocks * info.block_bytes)

    def plane(self, name: str, run: Run) -> Any:
        """A plane over a run: (blocks, block_size_tokens, *shape), strided, writable, no copy.

        The axes are the same whatever the plane's order; only the strides tell.
        """
        plane = self.plane_named(name)
        place = self._found[name].place
        size = self.layout.block_size_tokens
        hnd = plane.order is Order.HND
        lies = (plane.shape[0], size, *plane.shape[1:]) if hnd else (size, *plane.shape)
        dtype = numpy_dtype(plane)
        inner: list[int] = []
        step = dtype.itemsize
        for extent in reversed(lies):
            inner.insert(0, step)
            step *= extent
        array: NDArray[Any] = np.ndarray(
            (run.blocks, *lies),
            dtype,
            self._mapping,
            run.first_block * self.layout.block_bytes + place.offset_bytes,
            (self.layout.block_bytes, *inner),
        )
        return array.swapaxes(1, 2) if hnd else array

    def numpy_plane(self, name: str, run: Run) -> NDArray[Any]:
        """A plane over a run for numpy, no copy."""
        array: NDArray[Any] = self.plane(name, run)
        return array

    def torch_plane(self, name: str, run: Run) -> Any:
        """The same for torch, of the plane's true dtype. Imports torch."""
        import torch

        true = getattr(torch, self.plane_named(name).dtype.value)
        return torch.from_numpy(self.plane(name, run)).view(true)

    def torch_blocks(self) -> Any:
        """All of it as a torch tensor, (blocks, block_bytes) uint8, no copy. Imports torch."""
        import torch

        whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
        return whole.view(self.info.blocks, self.info.block_bytes)

    def empty(self, plane: Plane, tokens: int) -> Any:
        """(tokens, *shape) of the plane's dtype, beside the pool."""
        return empty_array((tokens, *plane.shape), numpy_dtype(plane))

    def checked(self, array: Any, plane: Plane, tokens: int | None = None) -> Any:
        """The caller's array, if it is (tokens, *shape) of the plane's dtype; FerryError(bad_array)."""
        return checked(bits_of(array), plane, tokens)

    def settle(self) -> GpuWork | None:
        """What has to be done before the daemon is told that blocks are filled or read."""
        return None

    def leave(self, why: Code = Code.CLIENT_CLOSED) -> None:
        """This process is to touch the pool no more; ``why`` is what it is told if it tries to."""

    def when_closed(self, then: Callable[[], None]) -> None:
        """Call it when the daemon may free the pool: now, what is mapped of a file outlives it."""
        then()

    def plane_named(self, name: str) -> Plane:
        """A plane of the layout; FerryError(bad_array) names those that there are."""
        found = self._found.get(name)
        if found is None:
            names = ", ".join(self._found)
            raise FerryError(Code.BAD_ARRAY, f"no plane {name!r} in the layout; it has {names}")
        return found.plane

    @cached_property
    def _found(self) -> dict[str, _Found]:
        """By name: a model has a hundred planes and more."""
        both = zip(self.layout.planes, self.layout.places, strict=True)
        return {plane.name: _Found(plane, place) for plane, place in both}


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

    def part(self, first_token: int, end_token: int) -> "WindowView":
        """The tokens [first_token, end_token) of it; FerryError(bad_array) for tokens outside."""
        self._check_inside(first_token, end_token)
        return WindowView(self._pool, first_token, end_token - first_token, self.runs)

    def numpy_runs(self, plane: str) -> list[NDArray[Any]]:
        """One array a run, (blocks, block_size_tokens, *shape), no copy; host pools only.

        Whole blocks: tokens outside of [first_token, end_token) hold nothing to be relied on.
        Raises FerryError(device_only) for a pool in a GPU's memory.
        """
        return [self._pool.numpy_plane(plane, run) for run in self.runs]

    def torch_runs(self, plane: str) -> list[Any]:
        """The same as torch tensors of the plane's true dtype, no copy. Imports torch."""
        return [self._pool.torch_plane(plane, run) for run in self.runs]

    def gather(self, plane: str, out: Any = None) -> Any:
        """Copy the window's tokens of a plane into one array, (tokens, *shape).

        ``out``: the caller's numpy array or torch tensor of that shape and the plane's dtype, filled
        and returned; without it a numpy array, or a tensor where the pool is. Tensors of a GPU go with
        pools of a GPU only. Raises FerryError(bad_array) if it is anything else.
        """
        found = self._pool.plane_named(plane)
        if out is None:
            out = self._pool.empty(found, self.tokens)
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise FerryError(Code.BAD_ARRAY, "out is an array that cannot be written")
        bits = self._pool.checked(out, found, self.tokens)
        for first, tokens, part in self._pieces(plane, self.first_token, self.end_token):
            at = first - self.first_token
            bits[at : at + tokens].reshape(part.shape)[...] = part
        return out

    def scatter(self, plane: str, first_token: int, array: Any) -> None:
        """Copy (tokens, *shape), a numpy array or torch tensor, in from ``first_token`` on.

        Raises FerryError(bad_array) if dtype or shape are not the plane's, or for tokens outside.
        """
        bits = self._pool.checked(array, self._pool.plane_named(plane))
        end = first_token + len(bits)
        self._check_inside(first_token, end)
        for first, tokens, part in self._pieces(plane, first_token, end):
            at = first - first_token
            part[...] = bits[at : at + tokens].reshape(part.shape)

    def _check_inside(self, first_token: int, end: int) -> None:
        if not self.first_token <= first_token <= end <= self.end_token:
            raise FerryError(
                Code.BAD_ARRAY,
                f"tokens [{first_token}, {end}) are not in [{self.first_token}, {self.end_token})",
            )

    def _pieces(self, plane: str, first: int, end: int) -> Any:
        """Yield (token, tokens, array) that cover [first, end) in order.

        An array is a part of one block, (tokens, *shape), or neighbouring whole ones, (blocks,
        block_size_tokens, *shape): one copy for as many as there are.
        """
        size = self._pool.layout.block_size_tokens
        for run in self.runs:
            low, high = max(first, run.first_token), min(end, run.first_token + run.blocks * size)
            if low >= high:
                continue
            blocks = self._pool.plane(plane, run)
            while low < high:
                block, inside = divmod(low - run.first_token, size)
                whole = 0 if inside else (high - low) // size
                if whole:
                    yield low, whole * size, blocks[block : block + whole]
                    low += whole * size
                    continue
                count = min(size - inside, high - low)
                yield low, count, blocks[block, inside : inside + count]
                low += count


def runs_of(base_tokens: int, block_size: int, runs: list[tuple[int, int]]) -> list[Run]:
    """A snapshot's runs with the token that each starts at."""
    found, token = [], base_tokens
    for first, blocks in runs:
        found.append(Run(token, first, blocks))
        token += blocks * block_size
    return found
