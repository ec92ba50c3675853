"""A pool in a GPU's memory: the daemon's own, seen as torch tensors without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry_client.arrays import Bits, bits_of, checked
from kvferry_client.cuda_driver import Closing, DriverError, Opened, device_with
from kvferry_client.views import GpuWork, Pool, Run
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout, Order, Plane
from kvferry_proto.worker import DeviceMemory, PoolInfo

if TYPE_CHECKING:
    from torch import Tensor


class DevicePool(Pool):
    """``memory`` is the pool as uint8; it is open as long as a tensor of it lives."""

    def __init__(self, info: PoolInfo, layout: Layout, memory: Tensor, closing: Closing) -> None:
        self.info = info
        self.layout = layout
        self._opened: Tensor | None = memory
        self._closing = closing
        self._why_left = Code.CLIENT_CLOSED

    @property
    def _memory(self) -> Tensor:
        if self._opened is None:
            raise FerryError(self._why_left, "this pool is open no more")
        return self._opened

    def plane(self, name: str, run: Run) -> Tensor:
        """A plane over a run: (blocks, block_size_tokens, *shape), strided, writable, no copy."""
        plane = self.plane_named(name)
        place = self._found[name].place
        size = self.layout.block_size_tokens
        hnd = plane.order is Order.HND
        lies = (plane.shape[0], size, *plane.shape[1:]) if hnd else (size, *plane.shape)
        inner: list[int] = []
        step = 1
        for extent in reversed(lies):
            inner.insert(0, step)
            step *= extent
        memory = self._memory.view(_dtype(plane))
        item = memory.element_size()  # blocks and planes start at multiples of 64 bytes
        block_items = self.layout.block_bytes // item
        first = run.first_block * block_items + place.offset_bytes // item
        tensor = memory.as_strided((run.blocks, *lies), (block_items, *inner), first)
        return tensor.transpose(1, 2) if hnd else tensor

    def numpy_plane(self, name: str, run: Run) -> Any:
        """FerryError(device_only): numpy sees no device memory."""
        raise FerryError(Code.DEVICE_ONLY, f"the pool is in the memory of {self._memory.device}")

    def torch_plane(self, name: str, run: Run) -> Tensor:
        return self.plane(name, run)

    def torch_blocks(self) -> Tensor:
        """All of it: (blocks, block_bytes) uint8, no copy."""
        size = self.info.blocks * self.info.block_bytes
        return self._memory[:size].view(self.info.blocks, self.info.block_bytes)

    def empty(self, plane: Plane, tokens: int) -> Tensor:
        """(tokens, *shape) on the pool's device."""
        import torch

        shape = (tokens, *plane.shape)
        return torch.empty(shape, dtype=_dtype(plane), device=self._memory.device)

    def checked(self, array: Any, plane: Plane, tokens: int | None = None) -> Tensor:
        """The array as a tensor of the plane's dtype: a numpy array, or a tensor of any device."""
        import torch

        if isinstance(array, torch.Tensor) and array.device.type != "cpu":
            bits = Bits(array.detach(), str(array.dtype).removeprefix("torch."))
            tensor: Tensor = checked(bits, plane, tokens)
        else:
            found = checked(bits_of(array), plane, tokens)
            if any(step < 0 for step in found.strides):
                raise FerryError(
                    Code.BAD_ARRAY, "an array that runs backwards is no tensor; copy it"
                )
            tensor = torch.from_numpy(found) if found.flags.writeable else torch.tensor(found)
        return tensor.view(_dtype(plane))

    def settle(self) -> GpuWork | None:
        """What this thread's current stream has been given so far."""
        import torch

        memory = self._opened
        if memory is None:
            return None  # all of it was waited for; the daemon will say what became of the pool
        if memory.device.type != "cuda":
            return GpuWork(lambda: None)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(memory.device)
        GpuWork(lambda: event.record(stream)).wait()  # a GPU that has failed says so here
        return GpuWork(event.synchronize)

    def leave(self, why: Code = Code.CLIENT_CLOSED) -> None:
        """Wait for all work of this process on the device, and let go of the pool.

        It is closed once no tensor of it is left: those must not be used any more.
        """
        import torch

        memory, self._opened = self._opened, None
        if memory is not None:
            self._why_left = why
        if memory is not None and memory.device.type == "cuda":
            GpuWork(lambda: torch.cuda.synchronize(memory.device)).wait()

    def when_closed(self, then: Callable[[], None]) -> None:
        """Call it once no tensor is left. The daemon must not free what is open in a worker."""
        self._closing.then(then)


def open_pool(info: PoolInfo, layout: Layout) -> Pool:
    """Map the pool's file, or open its device memory.

    FerryError(pool_unreachable) if that cannot be.
    """
    if info.device is None:
        try:
            return Pool(info, layout)
        except (OSError, ValueError) as error:
            raise FerryError(
                Code.POOL_UNREACHABLE, f"cannot map the pool's file {info.path}: {error}"
            ) from error
    try:
        memory, closing = _open(info.device, info.blocks * info.block_bytes)
    except (ImportError, DriverError, RuntimeError, AssertionError) as error:
        raise FerryError(
            Code.POOL_UNREACHABLE,
            f"cannot open the pool in the daemon's {info.device.device}: {error}",
        ) from error
    return DevicePool(info, layout, memory, closing)


def _open(device: DeviceMemory, size_bytes: int) -> tuple[Tensor, Closing]:
    import torch

    index = device_with(device.uuid)
    if index is None:
        raise DriverError(f"this process does not see the GPU with UUID {device.uuid.hex()}")
    name = f"cuda:{index}"
    torch.empty(1, device=name)  # torch begins with the device
    opened = Opened(index, device.handle, size_bytes)
    try:
        with torch.cuda.device(index):
            tensor = torch.as_tensor(opened, device=name)
        if tensor.data_ptr() != opened.address:
            raise DriverError("torch has copied the pool instead of showing it")
        return tensor, opened.closing
    finally:
        del opened  # else an error would keep it open, and the lock is let go of


def _dtype(plane: Plane) -> Any:
    import torch

    return getattr(torch, plane.dtype.value)
