"""When a worker with a device pool counts as gone: not before it has closed the memory.

A driver is played; what it opens is this process's own memory.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvferry_client import cuda_driver
from kvferry_client.board import Board
from kvferry_client.cuda_driver import Opened
from kvferry_client.device import DevicePool
from kvferry_client.session import Member, Session
from kvferry_client.views import Run
from kvferry_daemon.links.liveness import Liveness
from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Plane

LAYOUT = Layout(planes=(Plane(name="ids", dtype=Dtype.INT64),), block_size_tokens=8)
BLOCKS = 2
SIZE = BLOCKS * LAYOUT.block_bytes
INFO = worker.PoolInfo(
    path="",
    blocks=BLOCKS,
    block_bytes=LAYOUT.block_bytes,
    window_tokens=8,
    device=worker.DeviceMemory(device="cuda:0", uuid=b"u" * 16, handle=b"h" * 64),
)
WELCOME = worker.Welcome(
    version=1, boot_id="b" * 16, session="a" * 32, pool=INFO, heartbeat_s=1.0, peer_address=""
)


class Driver:
    """libcuda, as far as it is called here. ``is_held``: asked when memory is closed."""

    def __init__(self, is_held: Callable[[], bool]) -> None:
        self.memory = ctypes.create_string_buffer(SIZE)
        self.closed: list[bool] = []  # whether the lock was held then
        self.refuses = False
        self._is_held = is_held

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0

    def cuIpcOpenMemHandle_v2(self, address: Any, *_: Any) -> int:
        address._obj.value = ctypes.addressof(self.memory)
        return 0

    def cuIpcCloseMemHandle(self, _: ctypes.c_uint64) -> int:
        if self.refuses:
            return 700
        self.closed.append(self._is_held())
        return 0


class Shown:
    """Opened memory as numpy takes it; arrays keep it, as torch's tensors do in a GPU."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        where = (opened.address, False)
        self.__array_interface__ = {"version": 3, "shape": (SIZE,), "typestr": "|u1", "data": where}


class Scene:
    """A worker that has joined."""

    def __init__(self, directory: Path) -> None:
        (directory / "workers").mkdir()
        self.session = Session(directory, LAYOUT, "worker")
        self._liveness = Liveness(directory / "workers")
        self.driver = Driver(self.is_held)

    def is_held(self) -> bool:
        """As its daemon sees it."""
        return self._liveness.is_held(self.session.lock.name)

    def join(self) -> DevicePool:
        """Open the pool."""
        opened = Opened(0, b"h" * 64, SIZE)
        memory = torch.from_numpy(np.asarray(Shown(opened)))
        pool = DevicePool(INFO, LAYOUT, memory, opened.closing)
        self.session.member = Member(WELCOME, pool, Board(WELCOME))
        return pool


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path)
    monkeypatch.setattr(cuda_driver, "_driver", lambda: made.driver)
    cuda_driver._primary.cache_clear()
    yield made
    made.session.lock.release(is_known=True)
    cuda_driver._primary.cache_clear()


def test_a_worker_without_a_tensor_is_gone_when_it_closes_and_its_memory_first(
    scene: Scene,
) -> None:
    scene.join()
    assert scene.is_held()
    scene.session.close()
    assert scene.driver.closed == [True]
    assert not scene.is_held()


def test_a_worker_that_keeps_a_tensor_is_there_until_the_tensor_goes(scene: Scene) -> None:
    """Its daemon would free what is open here, and the driver does not say what comes of that."""
    kept = scene.join().plane("ids", Run(0, 0, BLOCKS))
    scene.session.close()
    assert scene.is_held()
    assert kept.sum() == 0
    scene.session.close()
    assert scene.driver.closed == []
    del kept
    assert scene.driver.closed == [True]
    assert not scene.is_held()


def test_a_worker_that_has_lost_its_pool_before_closes_at_once(scene: Scene) -> None:
    pool = scene.join()
    pool.leave()
    assert scene.driver.closed == [True]
    assert scene.is_held()
    scene.session.close()
    assert not scene.is_held()


def test_memory_that_the_driver_does_not_close_keeps_its_worker_there(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Until its process ends."""
    scene.join()
    scene.driver.refuses = True
    with caplog.at_level(logging.WARNING):
        scene.session.close()
    assert scene.is_held()
    assert "stays open until this process ends: cuIpcCloseMemHandle: error 700" in caplog.text


def test_a_worker_that_never_joined_is_gone_at_once(scene: Scene) -> None:
    assert scene.is_held()
    scene.session.close()
    assert not scene.is_held()
