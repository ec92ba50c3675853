"""The client libraries against real daemons."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvferry_client import (
    AsyncClient,
    Client,
    Dtype,
    FerryError,
    Layout,
    Mode,
    Plane,
    Role,
    State,
    connect,
)
from kvferry_proto import worker
from live import LiveDaemon

BLOCK, WINDOW = 16, 64
LAYOUT = Layout(
    planes=(
        Plane(name="k", dtype=Dtype.FLOAT32, shape=(2, 3)),
        Plane(name="bf", dtype=Dtype.BFLOAT16, shape=(4,)),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    aux=("first_token",),
    block_size_tokens=BLOCK,
)


def payload(tokens: int) -> dict[str, np.ndarray]:
    """Different bytes for every token and plane."""
    rng = np.random.default_rng(tokens)
    return {
        "k": rng.standard_normal((tokens, 2, 3), dtype=np.float32),
        "bf": rng.integers(0, 1 << 15, (tokens, 4), dtype=np.uint16),
        "ids": np.arange(tokens, dtype=np.int64),
    }


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[tuple[LiveDaemon, LiveDaemon]]:
    """A source's and a sink's daemon."""
    with LiveDaemon(tmp_path / "a") as a, LiveDaemon(tmp_path / "b") as b:
        yield a, b
        for daemon in (a, b):
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()


def pieces(arrays: dict[str, np.ndarray], size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Pieces of ``size`` tokens."""
    for first in range(0, len(arrays["ids"]), size):
        yield first, {name: array[first : first + size] for name, array in arrays.items()}


@pytest.mark.parametrize("tokens", [1, WINDOW, 3 * WINDOW + 5])
@pytest.mark.parametrize("min_tokens", [None, BLOCK])
def test_windows_arrive_as_arrays(
    daemons: tuple[LiveDaemon, LiveDaemon], tokens: int, min_tokens: int | None
) -> None:
    a, b = daemons
    arrays = payload(tokens)

    def send(client: Client) -> None:
        with client.send("t") as sending:
            for first, part in pieces(arrays, 13):
                last = first + 13 >= tokens
                sending.fill(first, part, aux={"first_token": 7} if last else None)
            sending.finish()
            sending.wait(20)

    with (
        connect(a.directory, LAYOUT, "source") as source,
        connect(b.directory, LAYOUT, "sink") as sink,
        sink.receive("t", source=a.address) as receiving,
    ):
        import threading

        thread = threading.Thread(target=send, args=(source,))
        thread.start()
        got: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
        for window in receiving.windows(min_tokens):
            for name, parts in got.items():
                parts.append(window.gather(name))
                joined = np.concatenate(
                    [r.reshape(-1, *r.shape[2:]) for r in window.numpy_runs(name)]
                )
                assert len(joined) >= window.tokens
        thread.join()
        assert receiving.total_tokens == tokens
        assert receiving.aux == {"first_token": 7}
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate(got[name]), array)


def test_the_asyncio_client_moves_the_same(daemons: tuple[LiveDaemon, LiveDaemon]) -> None:
    a, b = daemons
    arrays = payload(3 * WINDOW + 1)

    async def send(client: AsyncClient) -> None:
        async with await client.send(worker.Send(transfer_id="t")) as sending:
            for first, part in pieces(arrays, 50):
                await sending.fill(first, part)
            await sending.finish({"first_token": 1})
            await sending.wait(20)

    async def run() -> list[np.ndarray]:
        async with (
            AsyncClient(a.directory, LAYOUT) as source,
            AsyncClient(b.directory, LAYOUT) as sink,
        ):
            receive = worker.Receive(transfer_id="t", source=a.address)
            async with await sink.receive(receive) as receiving:
                task = asyncio.ensure_future(send(source))
                got = [window.gather("k") async for window in receiving.windows()]
                await task
                return got

    np.testing.assert_array_equal(np.concatenate(asyncio.run(run())), arrays["k"])


def test_an_exception_in_the_block_aborts_both_sides(
    daemons: tuple[LiveDaemon, LiveDaemon],
) -> None:
    a, b = daemons
    with (
        connect(a.directory, LAYOUT) as source,
        connect(b.directory, LAYOUT) as sink,
        sink.receive("t", source=a.address) as receiving,
    ):
        with pytest.raises(ZeroDivisionError), source.send("t") as sending:
            sending.fill(0, payload(BLOCK // sending.snapshot.sent_tokens))
        with pytest.raises(FerryError) as caught:
            receiving.wait(20)
        assert caught.value.code == "source_failed"
        assert "ZeroDivisionError" in caught.value.message


def test_whole_mode_and_torch_views(daemons: tuple[LiveDaemon, LiveDaemon]) -> None:
    import torch

    a, b = daemons
    arrays = payload(2 * WINDOW - 1)
    with (
        connect(a.directory, LAYOUT) as source,
        connect(b.directory, LAYOUT) as sink,
        sink.receive("t", source=a.address, mode=Mode.WHOLE, max_tokens=2 * WINDOW) as receiving,
    ):
        with source.send("t") as sending:
            sending.fill(0, arrays, aux={"first_token": 1})
        (window,) = receiving
        assert (window.first_token, window.tokens) == (0, 2 * WINDOW - 1)
        tensors = window.torch_runs("bf")
        assert tensors[0].dtype is torch.bfloat16
        flat = torch.cat([t.reshape(-1, 4) for t in tensors])[: window.tokens]
        expected = torch.from_numpy(arrays["bf"].view(np.int16)).view(torch.bfloat16)
        assert torch.equal(flat.view(torch.int16), expected.view(torch.int16))


def test_no_daemon_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FerryError) as caught:
        connect(tmp_path, LAYOUT)
    assert caught.value.code == "daemon_unreachable"
    assert str(tmp_path) in caught.value.message


def test_a_restarted_daemon_is_told_from_a_slow_one(tmp_path: Path) -> None:
    first = LiveDaemon(tmp_path / "a")
    with connect(first.directory, LAYOUT) as client:
        client.send("t")
        first.stop()
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
        with LiveDaemon(tmp_path / "a") as second:
            before = client.pool
            with pytest.raises(FerryError) as caught:
                client.poll(watched)
            assert caught.value.code == "daemon_restarted"
            assert client.pool is not before
            assert client.poll(watched).refused[0].error.code == "unknown_transfer"
            with client.send("t", attempt=1) as sending:
                sending.fill(0, payload(1), aux={"first_token": 1})
            assert sending.snapshot.total_tokens == 1
            assert second.status().workers == 1


def test_a_forked_child_is_refused(daemons: tuple[LiveDaemon, LiveDaemon]) -> None:
    a, _ = daemons
    with connect(a.directory, LAYOUT) as client:
        child = os.fork()
        if child == 0:
            try:
                client.poll(worker.Watched(role=Role.SINK, transfer_id="t"))
            except FerryError as error:
                os._exit(0 if "fork" in error.message else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_a_busy_worker_is_not_taken_for_a_lost_one(tmp_path: Path) -> None:
    """It makes no call for longer than lost_s; its heartbeat thread does."""
    with (
        LiveDaemon(tmp_path / "a", lost_s=0.8) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        sending = client.send("t")
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t", after=99)
        client.call(worker.Poll(transfers=[watched], wait_s=2))
        assert client.poll(watched.model_copy(update={"after": -1})).transfers[0].state is (
            State.BOOTSTRAPPING
        )
        sending.abort()
