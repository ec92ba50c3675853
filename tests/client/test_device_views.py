"""Windows of a pool in device memory, the CPU in a GPU's place: tensors, and when work is waited for."""

import asyncio
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvferry_client import FerryError, Pool, WindowView
from kvferry_client.aio import AsyncClient
from kvferry_client.board import Board
from kvferry_client.cuda_driver import Closing
from kvferry_client.device import DevicePool, open_pool
from kvferry_client.logic import ReceiveLogic, SendLogic
from kvferry_client.session import Member, Session, check_same_pool
from kvferry_client.sync import Client
from kvferry_client.views import GpuWork, runs_of
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.states import Role, State

BLOCK, BLOCKS = 4, 8
PLANES = (
    Plane(name="ids", dtype=Dtype.INT64),
    Plane(name="hnd", dtype=Dtype.FLOAT32, shape=(3, 5), order=Order.HND),
    Plane(name="bf", dtype=Dtype.BFLOAT16, shape=(3, 2, 5), order=Order.HND),
    Plane(name="f8", dtype=Dtype.FLOAT8_E4M3FN, shape=(3, 5)),
    Plane(name="mask", dtype=Dtype.BOOL, shape=(7,)),
)
LAYOUT = Layout(planes=PLANES, block_size_tokens=BLOCK)
RUNS = [(5, 2), (1, 1), (3, 1)]  # of a window from token 8 on, tokens 9 to 22 of which are there
MEMORY = worker.DeviceMemory(device="cuda:0", uuid=b"u" * 16, handle=b"h" * 64)
NAMES = [plane.name for plane in PLANES]


def device_pool() -> DevicePool:
    info = worker.PoolInfo(
        path="", blocks=BLOCKS, block_bytes=LAYOUT.block_bytes, window_tokens=4, device=MEMORY
    )
    memory = torch.zeros(BLOCKS * LAYOUT.block_bytes, dtype=torch.uint8)
    return DevicePool(info, LAYOUT, memory, Closing())


@pytest.fixture
def window() -> WindowView:
    return WindowView(device_pool(), 9, 14, runs_of(8, BLOCK, RUNS))


@pytest.fixture
def in_host(tmp_path: Path) -> WindowView:
    """The same window of a host pool, for comparison."""
    path = tmp_path / "pool"
    path.write_bytes(bytes(BLOCKS * LAYOUT.block_bytes))
    info = worker.PoolInfo(
        path=str(path), blocks=BLOCKS, block_bytes=LAYOUT.block_bytes, window_tokens=4
    )
    return WindowView(Pool(info, LAYOUT), 9, 14, runs_of(8, BLOCK, RUNS))


def numbers(plane: Plane, tokens: int) -> torch.Tensor:
    true = getattr(torch, plane.dtype.value)
    size = tokens * int(np.prod(plane.shape))
    made = torch.arange(1, 1 + size) % 7
    return made.reshape(tokens, *plane.shape).to(true)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_lie_as_they_do_in_a_host_pool(
    window: WindowView, in_host: WindowView, name: str
) -> None:
    made = numbers(LAYOUT.planes[NAMES.index(name)], 9)
    for one in (window, in_host):
        one.scatter(name, 11, made)
    host = Path(in_host._pool.info.path).read_bytes()
    assert isinstance(window._pool, DevicePool)
    assert window._pool._memory.numpy().tobytes() == host
    for pool in (window._pool, in_host._pool):  # what paged copies work on
        blocks = pool.torch_blocks()
        assert blocks.shape == (BLOCKS, LAYOUT.block_bytes)
        assert blocks.numpy().tobytes() == host
    runs = zip(window.torch_runs(name), in_host.torch_runs(name), strict=True)
    for ours, theirs in runs:
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.contiguous().view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_a_gather_brings_what_was_scattered(window: WindowView, name: str) -> None:
    plane = LAYOUT.planes[NAMES.index(name)]
    made = numbers(plane, 14)
    window.scatter(name, 9, made)
    got = window.gather(name)
    assert got.dtype == made.dtype
    assert got.view(torch.uint8).equal(made.view(torch.uint8))
    mine = torch.empty_like(made)
    assert window.gather(name, mine) is mine
    assert mine.view(torch.uint8).equal(made.view(torch.uint8))


def test_raw_bits_of_numpy_are_bits_and_no_numbers(window: WindowView) -> None:
    made = np.arange(14 * 30, dtype=np.uint16).reshape(14, 3, 2, 5)
    made.flags.writeable = False  # as JAX's are
    window.scatter("bf", 9, made)
    assert window.gather("bf").view(torch.uint16).numpy().tolist() == made.tolist()
    out = np.zeros_like(made)
    window.gather("bf", out)
    assert out.tolist() == made.tolist()
    out.flags.writeable = False
    with pytest.raises(FerryError, match="cannot be written"):
        window.gather("bf", out)


def test_runs_are_the_memory_itself(window: WindowView) -> None:
    window.torch_runs("ids")[0].fill_(5)
    assert window.gather("ids").tolist() == [5] * 7 + [0] * 7


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(14, dtype=torch.float32),
        torch.zeros((14, 1), dtype=torch.int64),
        torch.zeros(13, dtype=torch.int64),
        np.zeros(14, np.int32),
        np.zeros(14, np.int64)[::-1],
        [0] * 14,
    ],
)
def test_what_is_not_the_planes_is_refused(window: WindowView, wrong: Any) -> None:
    with pytest.raises(FerryError) as refused:
        window.gather("ids", wrong)
    assert refused.value.code == "bad_array"


def test_numpy_is_refused_with_what_there_is_instead(window: WindowView) -> None:
    with pytest.raises(FerryError, match="use torch_runs, gather or scatter") as refused:
        window.numpy_runs("ids")
    assert refused.value.code == "device_only"


def test_a_pool_that_was_left_shows_nothing(window: WindowView) -> None:
    kept = window.torch_runs("ids")
    window._pool.leave()
    window._pool.leave()
    assert kept[0].sum() == 0, "tensors hold the memory open"
    with pytest.raises(FerryError) as refused:
        window.torch_runs("ids")
    assert refused.value.code == "client_closed"
    assert said(sending(window._pool).release()) == ["release"], "the daemon says what became of it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_worker_that_cannot_open_the_pool_is_told_the_alternative() -> None:
    with pytest.raises(FerryError, match="or use device=host") as refused:
        open_pool(device_pool().info, LAYOUT)
    assert refused.value.code == "pool_unreachable"
    assert "the daemon's cuda:0" in refused.value.message


def test_a_transfer_of_a_lost_pool_says_so() -> None:
    class Joined:
        pool = device_pool()

    with pytest.raises(FerryError) as refused:
        check_same_pool(Joined(), device_pool())  # type: ignore[arg-type]
    assert refused.value.code == "pool_lost"


@pytest.mark.parametrize("code", [Code.UNKNOWN_SESSION, Code.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("is_current", [True, False])
def test_an_idle_worker_lets_go_of_a_lost_pool(
    tmp_path: Path, code: Code, is_current: bool
) -> None:
    """Its heart hears that the session is unknown; a newer session's pool is left alone."""
    (tmp_path / "workers").mkdir()
    session = Session(tmp_path, LAYOUT, "worker")
    pool = device_pool()
    welcome = worker.Welcome(
        version=1,
        boot_id="b" * 16,
        session=("a" if is_current else "b") * 32,
        pool=pool.info,
        heartbeat_s=1.0,
        peer_address="",
    )
    session.member = Member(welcome, pool, Board(welcome))
    hello = worker.Hello(lock="lock", layout=LAYOUT, session="a" * 32)
    session.refused(worker.Failure(error=ErrorInfo.of(code, "x")), hello)
    if code is Code.UNKNOWN_SESSION and is_current:
        with pytest.raises(FerryError, match="pool_lost"):
            pool.empty(PLANES[0], 1)
    else:
        assert len(pool.empty(PLANES[0], 1)) == 1
    session.close()


# --- work that is under way ---


def snapshot(**fields: Any) -> worker.Snapshots:
    given = {"role": Role.SOURCE, "transfer_id": "t", "attempt": 0, "snapshot": 1}
    given.update(state=State.TRANSFERRING, allocated_tokens=8, runs=[(0, 2)])
    return worker.Snapshots(transfers=[worker.Snapshot(**{**given, **fields})])


def sending(pool: Pool) -> SendLogic:
    logic = SendLogic(pool, worker.Send(transfer_id="t"))
    logic.note(snapshot())
    return logic


def receiving(pool: Pool) -> ReceiveLogic:
    logic = ReceiveLogic(pool, worker.Receive(transfer_id="t"))
    logic.note(snapshot(role=Role.SINK, sent_tokens=8, available_tokens=8))
    return logic


def said(steps: Generator[Any, Any, None]) -> list[str]:
    """What logic yields, answered as if nothing changed."""
    names = []
    try:
        step = next(steps)
        while True:
            names.append("wait" if isinstance(step, GpuWork) else step.kind)
            step = steps.send(None if isinstance(step, GpuWork) else snapshot())
    except StopIteration:
        return names


VERBS = {
    "ready": lambda pool: sending(pool).ready(4, None, None),
    "release of a source": lambda pool: sending(pool).release(),
    "resume": lambda pool: receiving(pool).resume(8),
    "release of a sink": lambda pool: receiving(pool).release(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_gpu_is_waited_for_before_the_daemon_is_told(verb: str) -> None:
    assert said(VERBS[verb](device_pool())) == ["wait", verb.split()[0]]


def test_who_polls_waits_for_nothing() -> None:
    assert said(receiving(device_pool()).change()) == ["poll"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_host_pool_has_nothing_to_wait_for(in_host: WindowView, verb: str) -> None:
    assert said(VERBS[verb](in_host._pool)) == [verb.split()[0]]


def steps_of(order: list[str], failing: bool) -> Generator[Any, Any, None]:
    def wait() -> None:
        order.append("waited")
        if failing:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    yield GpuWork(wait)
    order.append("told")


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_both_clients_wait_and_tell_nothing_if_the_gpu_failed(
    client: type[Client] | type[AsyncClient], failing: bool
) -> None:
    order: list[str] = []
    one = client.__new__(client)  # driving needs no daemon as long as no call is made

    def run() -> None:
        driven: Any = one.drive(steps_of(order, failing), device_pool())
        if driven is not None:
            asyncio.run(driven)

    if not failing:
        run()
        assert order == ["waited", "told"]
        return
    with pytest.raises(FerryError, match="illegal memory access") as refused:
        run()
    assert refused.value.code == "device_failed"
    assert order == ["waited"]
