"""What torch does not offer of the CUDA driver: a handle by which other processes open memory.

torch shares tensors too, but counts who has one in a file that every reader has to count down: a
reader that is killed would keep the memory for ever. The driver's own mappings end with their
process, however it ends.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

HANDLE_BYTES, UUID_BYTES = 64, 16


class DriverError(OSError):
    """The driver refused a call, or is not there."""


class Exported(NamedTuple):
    """An allocation as another process finds it."""

    uuid: bytes  # of the GPU
    handle: bytes
    base: int  # address of the allocation that the handle opens
    size_bytes: int


def export(index: int, address: int) -> Exported:
    """The allocation around ``address`` of CUDA device ``index``; DriverError if it has no handle.

    torch must have begun with the device: its context is the one that is used.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    uuid, handle = (ctypes.c_char * UUID_BYTES)(), (ctypes.c_char * HANDLE_BYTES)()
    device = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
    _call("cuCtxPushCurrent_v2", _context(index))
    try:
        found = (ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        _call("cuMemGetAddressRange_v2", *found)
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    return Exported(uuid.raw, handle.raw, base.value, size.value)


@cache  # kept for as long as the process lives: the context is torch's, too
def _context(index: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from error


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    result = getattr(driver, name)(*arguments)
    if result:
        words = ctypes.c_char_p()
        driver.cuGetErrorString(result, ctypes.byref(words))
        why = (words.value or b"unknown").decode(errors="replace")
        raise DriverError(f"{name}: error {result}, {why}")
