"""Whole daemons whose pools are in a device, for which the CPU stands in; workers are played.

A worker opens a device pool through the driver, which is not here: these look into the daemon's own
arena instead. All else is as it is with a GPU, staging and threads included.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.conftest import Flow
from dead_cuda import bring_back, end_context
from kvferry_daemon.config import Config
from kvferry_daemon.daemon import Daemon
from kvferry_daemon.memory.device import Device
from kvferry_daemon.memory.device_pool import DevicePool
from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.states import Role, State
from live import BLOCK, LAYOUT, WINDOW, RawWorker

WAIT_S = 20.0


class InThread:
    """A daemon on a loop of its own, whose config no operator could write: device is ``cpu``."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        config = Config(
            runtime_dir=directory,
            window_tokens=WINDOW,
            pool_tokens=4 * WINDOW,
            heartbeat_s=0.2,
            lost_s=WAIT_S,  # the workers here do not beat
            transport="tcp",  # else NIXL would be taken for device memory
            **settings,
        ).model_copy(update={"device": "cpu"})
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, args=(config,))
        self._up = threading.Event()
        self.thread.start()
        assert self._up.wait(WAIT_S)
        self.directory = directory
        self.address = self.daemon.peer_address

    def _run(self, config: Config) -> None:
        async def begin() -> None:
            self.daemon = Daemon(config)
            self._up.set()

        self.loop.run_until_complete(begin())
        self.loop.run_forever()

    def pool(self, layout: Layout = LAYOUT) -> DevicePool:
        pool = self.daemon.effects.pools[layout.digest.hex()]
        assert isinstance(pool, DevicePool)
        return pool

    def stop(self) -> None:
        """End it as a signal would, without draining: the ledger stays for the next life."""
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.daemon.close(), self.loop).result(WAIT_S)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(WAIT_S)
            self.loop.close()


class DeviceWorker(RawWorker):
    """Reads and writes blocks where the daemon has them."""

    def __init__(self, daemon: InThread, layout: Layout = LAYOUT) -> None:
        super().__init__(daemon.directory, layout)
        self.pool = daemon.pool(layout)  # there since the hello

    def block(self, block: int) -> bytes:
        size = self.pool.block_bytes
        return bytes(self.pool.arena[block * size : (block + 1) * size].tolist())

    def write_block(self, block: int, data: bytes) -> None:
        size = self.pool.block_bytes
        assert len(data) == size
        made = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.pool.arena[block * size : (block + 1) * size].copy_(made)


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[InThread]]:
    """A source's and a sink's; a test may put another life in place of one."""
    made = [InThread(tmp_path / name) for name in "ab"]
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def flow(daemons: list[InThread]) -> Iterator[Flow]:
    source, sink = daemons
    with DeviceWorker(source) as one, DeviceWorker(sink) as two:
        yield Flow(one, two, source.address, "t", 3 * WINDOW + 5)


@pytest.mark.parametrize("total", [1, BLOCK, WINDOW + 1, 3 * WINDOW + 5])
def test_every_byte_arrives_by_way_of_the_buffers(flow: Flow, total: int) -> None:
    flow.total = total
    flow.open()
    flow.run()


def test_blocks_of_another_transfer_are_wiped_before_they_are_another_ones(flow: Flow) -> None:
    flow.open()
    flow.run()
    for role in Role:
        flow.release(role)
    assert any(flow.source.block(0))
    one = flow.source.snapshot(worker.Send(transfer_id="u"))
    one = flow.source.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW, "u")
    for _, block in flow.source.window(one):
        assert not any(flow.source.block(block))


@pytest.mark.parametrize("within", [False, True], ids=["two daemons", "one"])
def test_heads_of_another_order_and_block_size_arrive(
    daemons: list[InThread], within: bool
) -> None:
    """Slices, which the device collects; within a daemon they do not leave it."""
    plane = Plane(name="k", dtype=Dtype.INT16, shape=(2, 3), heads_total=2)
    here = Layout(planes=(plane,), block_size_tokens=4)
    there = Layout(planes=(plane.model_copy(update={"order": Order.HND}),), block_size_tokens=8)
    source, sink = (daemons[0], daemons[0]) if within else daemons
    with DeviceWorker(source, here) as one, DeviceWorker(sink, there) as two:
        one.snapshot(worker.Send(transfer_id="t", total_tokens=16))
        two.snapshot(worker.Receive(transfer_id="t", source=None if within else source.address))
        seen = one.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == 16)
        for token, block in enumerate(b for first, n in seen.runs for b in range(first, first + n)):
            content = bytes(range(token * 48, (token + 1) * 48))  # 4 tokens of 2 heads of 3 items
            one.write_block(block, content + bytes(here.block_bytes - 48))
        one.snapshot(worker.Ready(transfer_id="t", ready_tokens=16))
        end = two.wait_end(Role.SINK)
        assert end.state is State.SUCCESS, end
        blocks = [b for first, n in end.runs for b in range(first, first + n)]
        for first, block in zip((0, 8), blocks, strict=True):
            heads = [
                b"".join(
                    bytes(range(t * 12 + h * 6, t * 12 + h * 6 + 6))
                    for t in range(first, first + 8)
                )
                for h in range(2)
            ]
            assert two.block(block)[: 8 * 12] == b"".join(heads)


def wait_until_alone(daemon: InThread) -> None:
    """Until the daemon has seen that all workers are gone."""
    until = time.monotonic() + WAIT_S
    while daemon.daemon.node.sessions:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("role", list(Role))
def test_a_device_that_fails_fails_its_transfers_and_the_next_pool_serves(
    daemons: list[InThread], flow: Flow, role: Role
) -> None:
    source, sink = daemons
    flow.to_the_middle()
    broken, name = (sink, "sink") if role is Role.SINK else (source, "source")
    me = flow.consumer if role is Role.SINK else flow.source
    other = flow.source if role is Role.SINK else flow.consumer
    broken.pool().arena.untyped_storage().resize_(0)
    flow.consumer.snapshot(worker.Resume(**flow.named, sent_tokens=WINDOW))
    end = me.wait_end(role)
    assert end.error is not None
    assert end.error.code == "device_failed"
    assert "a copy on cpu failed" in end.error.message
    end = other.wait_end(Role.SOURCE if role is Role.SINK else Role.SINK)
    assert end.error is not None
    assert end.error.code == f"{name}_failed"
    assert me.code(worker.Send(transfer_id="u")) == "device_failed"
    with RawWorker(broken.directory, hello=False) as early:
        hello = worker.Hello(lock=early.lock_name, layout=LAYOUT)
        assert early.code(hello) == "device_failed", "its pool is still open in a worker"
    me.close()
    me.close = lambda: None  # type: ignore[method-assign]
    wait_until_alone(broken)
    with DeviceWorker(broken) as again:
        assert again.snapshot(worker.Send(transfer_id="u")).state is State.BOOTSTRAPPING
        seen = again.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW, "u")
        again.fill(seen, BLOCK)


def test_after_a_restart_its_transfers_are_lost_and_their_next_attempt_succeeds(
    daemons: list[InThread], flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    flow.to_the_middle()
    session = flow.consumer.welcome
    assert session is not None
    daemons[1].stop()
    daemons[1] = sink = InThread(daemons[1].directory)
    assert "a pool was in cpu and is lost, with its transfers" in caplog.text
    hello = worker.Hello(lock=flow.consumer.lock_name, layout=LAYOUT, session=session.session)
    assert flow.consumer.code(hello) == "unknown_session"
    with DeviceWorker(sink) as consumer:
        end = consumer.poll(Role.SINK)
        assert end.state is State.FAILED
        assert end.error is not None
        assert end.error.code == "pool_lost"
        assert flow.source.wait_end(Role.SOURCE).error is not None
        flow.release(Role.SOURCE)
        next_try = Flow(flow.source, consumer, daemons[0].address, "t", WINDOW + 5, attempt=1)
        next_try.open()
        next_try.run()


def refusal(daemon: InThread) -> Any:
    """The error with which a worker is sent away."""
    with RawWorker(daemon.directory, hello=False) as one:
        reply = one.call(worker.Hello(lock=one.lock_name, layout=LAYOUT))
        assert isinstance(reply, worker.Failure), reply
        return reply.error


def device_of(daemon: InThread) -> Device:
    device = daemon.daemon.effects.pools._device
    assert device is not None
    return device


def test_who_comes_when_the_device_is_lost_is_told_so(
    daemons: list[InThread], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where giving its memory back fails, as all else there does."""
    end_context(device_of(daemons[0]))
    for _ in range(2):
        error = refusal(daemons[0])
        assert error.code == "device_failed"
        assert "an illegal memory access was encountered" in error.message
        assert "the daemon has lost the device and must be restarted" in error.message
    assert "cpu keeps what this process has freed" in caplog.text


def test_a_pool_that_our_own_fault_keeps_from_being_made_is_refused_and_can_be_made_later(
    daemons: list[InThread], caplog: pytest.LogCaptureFixture
) -> None:
    device = device_of(daemons[0])
    end_context(device, TypeError)
    assert refusal(daemons[0]).code == "internal"
    assert "our own fault: cannot make pool" in caplog.text
    bring_back(device)
    with DeviceWorker(daemons[0]) as one:
        assert one.snapshot(worker.Send(transfer_id="t")).state is State.BOOTSTRAPPING
