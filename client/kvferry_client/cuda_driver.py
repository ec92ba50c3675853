"""Opening a GPU's memory that the daemon has allocated, with the CUDA driver's own calls."""

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

UUID_BYTES, HANDLE_BYTES = 16, 64
LAZY_PEER_ACCESS = 1
log = logging.getLogger(__name__)


class DriverError(OSError):
    """The driver refused a call, or is not there."""


class Closing:
    """What waits for memory to be closed. A finalizer may come in the midst of it: it has no lock."""

    def __init__(self) -> None:
        self._is_closed = False
        self._waiting: list[Callable[[], None]] = []

    def then(self, call: Callable[[], None]) -> None:
        """Call it as soon as the memory is closed: now, or in the thread that closes it."""
        self._waiting.append(call)
        if self._is_closed:
            self._call_all()

    def closed(self) -> None:
        """It is."""
        self._is_closed = True
        self._call_all()

    def _call_all(self) -> None:
        while True:
            try:
                call = self._waiting.pop()  # atomic: each is called once
            except IndexError:
                return
            call()


class Opened:
    """Memory of another process, open as long as this object and the tensors made of it live.

    torch takes it as it is: ``torch.as_tensor(opened, device=...)``.
    """

    def __init__(self, index: int, handle: bytes, size_bytes: int) -> None:
        """Open it in CUDA device ``index``, with which torch has begun; DriverError."""
        address = ctypes.c_uint64()
        with _context(index):
            by_value = _Handle.from_buffer_copy(handle)
            opened = (ctypes.byref(address), by_value, ctypes.c_uint(LAZY_PEER_ACCESS))
            _call("cuIpcOpenMemHandle_v2", *opened)
        self.address = address.value
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "version": 2,
        }
        self.closing = Closing()
        # Not at exit: the process's end closes it, and the driver may be gone by then.
        weakref.finalize(self, _close, index, address.value, self.closing).atexit = False


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


def device_with(uuid: bytes) -> int | None:
    """The index that the GPU with this UUID has in this process; None if it is not visible."""
    _call("cuInit", 0)
    count, device = ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(count))
    for index in range(count.value):
        found = (ctypes.c_char * UUID_BYTES)()
        _call("cuDeviceGet", ctypes.byref(device), index)
        _call("cuDeviceGetUuid_v2", ctypes.byref(found), device)
        if found.raw == uuid:
            return index
    return None


def _close(index: int, address: int, closing: Closing) -> None:
    try:
        with _context(index):
            _call("cuCtxSynchronize")  # what the GPU was given before the last tensor went
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))
    except DriverError as error:  # of a finalizer nobody hears an exception
        log.warning("the daemon's memory stays open until this process ends: %s", error)
    else:
        closing.closed()


@contextmanager
def _context(index: int) -> Iterator[None]:
    """Within, the driver's calls are about torch's context of a device."""
    _call("cuCtxPushCurrent_v2", _primary(index))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache  # kept for as long as the process lives: what was opened must not outlive it
def _primary(index: int) -> ctypes.c_void_p:
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
