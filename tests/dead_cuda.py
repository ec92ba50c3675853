"""torch as it is once the context of its GPU has ended: whatever asks CUDA for something fails."""

from collections.abc import Callable
from typing import Any

import torch

from kvferry_daemon.memory.device import Device


class DeadTorch:
    """In torch's place, and in that of ``torch.cuda``."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        self._error = error
        self.cuda = self

    def __getattr__(self, name: str) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            raise self._error(f"{name}: CUDA error: an illegal memory access was encountered")

        return fail


def end_context(device: Device, error: type[Exception] = RuntimeError) -> None:
    """The CPU in a GPU's place is a GPU whose context has ended; ``error``: what torch raises."""
    device.is_cuda = True
    device._torch = DeadTorch(error)  # type: ignore[assignment]


def bring_back(device: Device) -> None:
    """It works again, which no real one does."""
    device.is_cuda = False
    device._torch = torch
