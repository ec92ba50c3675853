"""Real daemons with pools in a GPU, and workers that open them: this process, and ones that die."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.processes import kvferry
from client.payloads import BLOCK, WINDOW, Daemons
from kvferry_client import (
    AsyncClient,
    Client,
    Dtype,
    FerryError,
    Layout,
    Order,
    Plane,
    Receiving,
    Sending,
    connect,
)
from live import LiveDaemon

pytestmark = pytest.mark.gpu
HEADS, DIM, LAYERS = 4, 64, 3
GPU = "cuda:0"
FLAGS = {"device": GPU, "budget_bytes": 256 << 20}
TOKENS = 3 * WINDOW + 5
LESS = WINDOW - BLOCK  # than a window: it is shown whole once all of it is there


def layout_of(order: Order = Order.NHD, block: int = BLOCK) -> Layout:
    planes = [
        Plane(
            name=f"k{n}", dtype=Dtype.BFLOAT16, shape=(HEADS, DIM), heads_total=HEADS, order=order
        )
        for n in range(LAYERS)
    ]
    return Layout(planes=(*planes, Plane(name="ids", dtype=Dtype.INT64)), block_size_tokens=block)


LAYOUT = layout_of()


def payload(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    made = torch.Generator(device=GPU).manual_seed(tokens)
    arrays = {
        f"k{n}": torch.randn((tokens, HEADS, DIM), device=GPU, generator=made).bfloat16()
        for n in range(LAYERS)
    }
    return {**arrays, "ids": torch.arange(tokens, device=GPU)}


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    with LiveDaemon(tmp_path / "a", **FLAGS) as a, LiveDaemon(tmp_path / "b", **FLAGS) as b:
        yield a, b
        for daemon in (a, b):
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()


def moved(
    source: Client,
    sink: Client,
    address: str | None,
    arrays: dict[str, torch.Tensor],
    attempt: int = 0,
) -> dict[str, torch.Tensor]:
    """Send a payload window by window; return what arrived."""
    got: dict[str, list[torch.Tensor]] = {name: [] for name in arrays}
    tokens = len(arrays["ids"])
    with (
        source.send("t", attempt=attempt) as sending,
        sink.receive("t", attempt=attempt, source=address) as receiving,
    ):
        windows, at = receiving.windows(), 0
        while True:
            end = min(tokens, at + WINDOW)
            if at < tokens:
                sending.fill(at, {name: array[at:end] for name, array in arrays.items()})
                at = end
                if at == tokens:
                    sending.finish()
            window = next(windows, None)
            if window is None:
                break
            for name in arrays:
                got[name].append(torch.as_tensor(window.gather(name)).to(GPU))
    return {name: torch.cat(parts) for name, parts in got.items()}


def check(got: dict[str, torch.Tensor], arrays: dict[str, torch.Tensor]) -> None:
    for name, array in arrays.items():
        mine = got[name].view(array.dtype)
        assert mine.view(torch.uint8).equal(array.view(torch.uint8)), name


@contextmanager
def both_ways(a: LiveDaemon, b: LiveDaemon) -> Iterator[tuple[Sending, Receiving]]:
    """A transfer between two daemons, opened by two workers of this process."""
    with (
        connect(a.directory, LAYOUT) as source,
        connect(b.directory, LAYOUT) as sink,
        source.send("t") as sending,
        sink.receive("t", source=a.address) as receiving,
    ):
        yield sending, receiving


def busy(cycles: int) -> None:
    """Keep the current stream at work: 2 billion cycles are about a second."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def test_bytes_go_from_one_daemons_device_memory_to_anothers(daemons: Daemons) -> None:
    a, b = daemons
    arrays = payload()
    with connect(a.directory, LAYOUT) as source, connect(b.directory, LAYOUT) as sink:
        assert source.pool.info.device is not None
        assert source.pool.info.device.device == GPU
        check(moved(source, sink, a.address, arrays), arrays)


def test_a_handoff_within_a_daemon_copies_nothing(daemons: Daemons) -> None:
    a, _ = daemons
    arrays = payload()
    with connect(a.directory, LAYOUT) as source, connect(a.directory, LAYOUT) as sink:
        check(moved(source, sink, None, arrays), arrays)
    assert a.status().counters["blocks_handed_over"] > 0


def test_other_orders_and_block_sizes_are_collected_in_the_device(daemons: Daemons) -> None:
    a, b = daemons
    arrays = payload()
    hnd = layout_of(Order.HND, 2 * BLOCK)
    with connect(a.directory, LAYOUT) as source, connect(b.directory, hnd) as sink:
        check(moved(source, sink, a.address, arrays), arrays)


@pytest.mark.parametrize("host", ["source", "sink"])
def test_the_other_side_may_be_in_host_memory(tmp_path: Path, host: str) -> None:
    arrays = payload()
    with (
        LiveDaemon(tmp_path / "a", **({} if host == "source" else FLAGS)) as a,
        LiveDaemon(tmp_path / "b", **({} if host == "sink" else FLAGS)) as b,
        connect(a.directory, LAYOUT) as source,
        connect(b.directory, LAYOUT) as sink,
    ):
        sent = {n: t.cpu() for n, t in arrays.items()} if host == "source" else arrays
        got: dict[str, torch.Tensor] = {}
        if host == "source":
            got = moved(source, sink, a.address, sent)
        else:
            with source.send("t") as sending, sink.receive("t", source=a.address) as receiving:
                sending.fill(0, {name: array[:LESS] for name, array in sent.items()})
                sending.finish()
                (window,) = receiving
                got = {n: torch.cat(window.torch_runs(n)).flatten(0, 1).to(GPU) for n in sent}
            arrays = {name: array[:LESS] for name, array in arrays.items()}
        check(got, arrays)


def test_ready_waits_for_what_the_gpu_was_given_before(daemons: Daemons) -> None:
    """The source's kernels are queued behind a second of work when ready is called."""
    a, b = daemons
    arrays = payload(WINDOW)
    with both_ways(a, b) as (sending, receiving):
        window = next(sending.windows())
        busy(2_000_000_000)
        for name, array in arrays.items():
            window.scatter(name, 0, array)
        sending.ready(WINDOW, WINDOW)
        (arrived,) = receiving
        check({name: arrived.gather(name) for name in arrays}, arrays)


def test_resume_waits_for_the_reader(daemons: Daemons) -> None:
    """The window's blocks are overwritten by the next window only when they have been read."""
    a, b = daemons
    arrays = payload()
    with both_ways(a, b) as (sending, receiving):
        got, at = [], 0
        windows = receiving.windows()
        while True:
            end = min(TOKENS, at + WINDOW)
            if at < TOKENS:
                sending.fill(at, {name: array[at:end] for name, array in arrays.items()})
                at = end
                if at == TOKENS:
                    sending.finish()
            window = next(windows, None)
            if window is None:
                break
            busy(500_000_000)
            got.append(window.gather("k0"))  # queued: the sleep is before it
        check({"k0": torch.cat(got)}, {"k0": arrays["k0"]})


def test_the_asyncio_client_does_the_same(daemons: Daemons) -> None:
    a, b = daemons
    arrays = payload(WINDOW)

    async def run() -> None:
        async with (
            AsyncClient(a.directory, LAYOUT) as source,
            AsyncClient(b.directory, LAYOUT) as sink,
            await source.send("t") as sending,
            await sink.receive("t", source=a.address) as receiving,
        ):
            await sending.fill(0, arrays)
            await sending.finish()
            async for window in receiving.windows():
                check({name: window.gather(name) for name in arrays}, arrays)

    asyncio.run(run())


def test_numpy_is_refused_and_host_arrays_are_copied(daemons: Daemons) -> None:
    a, b = daemons
    arrays = payload(BLOCK)
    with both_ways(a, b) as (sending, receiving):
        sending.fill(0, {name: array.cpu() for name, array in arrays.items()})
        sending.finish()
        (window,) = receiving
        out = np.zeros(BLOCK, np.int64)
        assert window.gather("ids", out).tolist() == list(range(BLOCK))
        with pytest.raises(FerryError) as refused:
            window.numpy_runs("ids")
        assert refused.value.code == "device_only"


def test_a_client_that_is_closed_is_gone_with_its_last_tensor(daemons: Daemons) -> None:
    """The daemon would free what is open there."""
    a, _ = daemons
    client = connect(a.directory, LAYOUT)
    kept = client.pool.torch_blocks()
    client.close()
    workers = a.directory / "workers"
    [name] = os.listdir(workers)
    with (workers / name).open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert a.status().workers == 1
    del kept
    until = time.monotonic() + 10
    while a.status().workers:
        assert time.monotonic() < until
        time.sleep(0.05)


WORKER = """
import sys, time
from gpu.test_device_pools import LAYOUT, payload
from kvferry_client import connect
client = connect(sys.argv[1], LAYOUT)
sending = client.send("t", attempt=int(sys.argv[2]))
window = next(sending.windows())
window.torch_runs("ids")[0].fill_(7)
print("filled", flush=True)
time.sleep(600)
"""


def test_a_worker_that_is_killed_leaves_no_mapping_and_starts_again(daemons: Daemons) -> None:
    a, b = daemons
    path = os.pathsep.join(p for p in sys.path if p)
    free = []
    for attempt in range(4):
        command = [sys.executable, "-c", WORKER, str(a.directory), str(attempt)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        ) as dying:
            assert dying.stdout is not None
            assert dying.stdout.readline() == "filled\n"
            dying.send_signal(signal.SIGKILL)
        a.wait_until_free()
        free.append(settled_free_bytes())
    assert max(free) - min(free) < 64 << 20, "each death would keep a context and a pool"
    arrays = payload()
    with connect(a.directory, LAYOUT) as source, connect(b.directory, LAYOUT) as sink:
        check(moved(source, sink, a.address, arrays, attempt=9), arrays)


def settled_free_bytes() -> int:
    """Free device memory, once what dead processes had has come back."""
    before, until = -1, time.monotonic() + 10
    while time.monotonic() < until:
        now = int(torch.cuda.mem_get_info(0)[0])
        if now == before:
            return now
        before = now
        time.sleep(0.5)
    return before


@pytest.mark.parametrize("killed", ["source", "sink"])
def test_a_killed_daemon_loses_its_pool_and_the_next_attempt_succeeds(
    tmp_path: Path, killed: str
) -> None:
    lives = {name: LiveDaemon(tmp_path / name, **FLAGS) for name in ("source", "sink")}
    arrays = payload()
    source = connect(lives["source"].directory, LAYOUT)
    sink = connect(lives["sink"].directory, LAYOUT)
    address = lives["source"].address
    sending, receiving = source.send("t"), sink.receive("t", source=address)
    sending.fill(0, {name: array[:WINDOW] for name, array in arrays.items()})
    mine, other = (sending, receiving) if killed == "source" else (receiving, sending)
    lives["sink"].wait_for_transfer("t", lambda row: row.snapshot.sent_tokens == WINDOW)
    lives[killed].process.kill()
    lives[killed] = lives[killed].again()
    assert "is lost, with its transfers" in lives[killed].log()
    with pytest.raises(FerryError) as refused:
        mine.wait(20)
    assert refused.value.code == "pool_lost"
    [row] = lives[killed].transfers("t")
    assert row.snapshot.error is not None
    assert row.snapshot.error.code == "pool_lost"
    with pytest.raises(FerryError, match="pool_lost"):
        other.wait(20)
    other.release()
    del mine, other, sending, receiving
    check(moved(source, sink, lives["source"].address, arrays, attempt=1), arrays)
    for client in (source, sink):
        client.close()
    for life in lives.values():
        life.wait_until_free()
        life.stop()


# --- what is refused ---


def test_a_device_that_does_not_exist_stops_the_daemon_with_its_name(tmp_path: Path) -> None:
    done = kvferry("serve", "--runtime-dir", tmp_path / "a", "--device", "cuda:99")
    assert done.returncode == 3
    assert "cuda:99 does not exist; CUDA devices that this process sees: cuda:0" in done.stderr


def test_too_little_device_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    budget = 1 << 42
    with LiveDaemon(tmp_path / "a", device=GPU, budget_bytes=budget, pool_tokens=1 << 40) as a:
        with pytest.raises(
            FerryError, match=r"needs \d+ bytes of cuda:0, which has \d+ of"
        ) as refused:
            connect(a.directory, LAYOUT)
        assert refused.value.code == "pool_refused"


def test_memory_that_workers_cannot_open_is_refused_with_the_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with LiveDaemon(tmp_path / "a", **FLAGS) as a:
        with pytest.raises(FerryError, match="set device=host") as refused:
            connect(a.directory, LAYOUT)
        assert refused.value.code == "pool_unreachable"


def test_a_worker_that_does_not_see_the_gpu_is_told(daemons: Daemons) -> None:
    a, _ = daemons
    program = (
        "import sys; from gpu.test_device_pools import LAYOUT; from kvferry_client import connect\n"
        "connect(sys.argv[1], LAYOUT)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, str(a.directory)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode != 0
    assert "pool_unreachable" in done.stderr


def test_the_doctor_gets_a_handle_for_workers(tmp_path: Path) -> None:
    done = kvferry("doctor", "--json", "--runtime-dir", tmp_path / "a", "--device", "cuda:0")
    seen = {one["what"]: one for one in json.loads(done.stdout)["findings"]}["GPU"]
    assert (seen["verdict"], "handle for workers" in seen["seen"]) == ("well", True), seen
