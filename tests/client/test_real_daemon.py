"""The client libraries against real daemons."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from client.payloads import BLOCK, LAYOUT, WINDOW, Daemons, payload, pieces
from kvferry_client import (
    AsyncClient,
    Client,
    Dtype,
    FerryError,
    Layout,
    Mode,
    Order,
    Plane,
    Role,
    State,
    connect,
)
from kvferry_client.logic import SendLogic
from kvferry_proto import worker
from live import LiveDaemon


@pytest.mark.parametrize("tokens", [BLOCK - 3, WINDOW - 1])
def test_planes_that_lie_head_by_head_arrive_to_the_last_token(
    daemons: Daemons, tokens: int
) -> None:
    k = Plane(name="k", dtype=Dtype.FLOAT32, shape=(2, 3), order=Order.HND)
    layout = Layout(planes=(k, *LAYOUT.planes[1:]), block_size_tokens=BLOCK)
    a, b = daemons
    arrays = payload(tokens)
    with connect(a.directory, layout) as source, connect(b.directory, layout) as sink:
        with source.send("t") as sending:
            sending.fill(0, arrays)
        with sink.receive("t", source=a.address) as receiving:
            (window,) = receiving
            for name, array in arrays.items():
                np.testing.assert_array_equal(window.gather(name), array)


@pytest.mark.parametrize("tokens", [1, WINDOW, 3 * WINDOW + 5])
@pytest.mark.parametrize("min_tokens", [None, BLOCK])
def test_windows_arrive_as_arrays(daemons: Daemons, tokens: int, min_tokens: int | None) -> None:
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


def test_the_asyncio_client_moves_the_same(daemons: Daemons) -> None:
    a, b = daemons
    arrays = payload(3 * WINDOW + 1)

    async def send(client: AsyncClient) -> None:
        async with await client.send("t") as sending:
            for first, part in pieces(arrays, 50):
                await sending.fill(first, part)
            await sending.finish({"first_token": 1})
            await sending.wait(20)

    async def run() -> list[np.ndarray]:
        async with (
            AsyncClient(a.directory, LAYOUT) as source,
            AsyncClient(b.directory, LAYOUT) as sink,
            await sink.receive("t", source=a.address) as receiving,
        ):
            task = asyncio.ensure_future(send(source))
            got = [window.gather("k") async for window in receiving.windows()]
            await task
            return got

    np.testing.assert_array_equal(np.concatenate(asyncio.run(run())), arrays["k"])


def test_an_exception_in_the_block_aborts_both_sides(
    daemons: Daemons,
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


def test_whole_mode_and_torch_views(daemons: Daemons) -> None:
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


def test_a_busy_worker_is_not_taken_for_a_lost_one(tmp_path: Path) -> None:
    """It makes no call for longer than lost_s; its heartbeat thread does."""
    with (
        LiveDaemon(tmp_path / "a", lost_s=2) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        sending = client.send("t")
        watched = worker.Watched(role=Role.SOURCE, transfer_id="t", after=99)
        client.call(worker.Poll(transfers=[watched], wait_s=5))
        assert client.poll(watched.model_copy(update={"after": -1})).transfers[0].state is (
            State.BOOTSTRAPPING
        )
        sending.abort()


def test_a_sink_that_has_a_prefix_gets_what_is_behind_it(daemons: Daemons) -> None:
    a, b = daemons
    arrays = payload(WINDOW)
    with connect(a.directory, LAYOUT) as source, connect(b.directory, LAYOUT) as sink:
        with source.send("t") as sending:
            sending.fill(0, arrays, aux={"first_token": 1})
        with sink.receive("t", source=a.address, start_tokens=2 * BLOCK) as receiving:
            windows = [(w.first_token, w.gather("ids").copy()) for w in receiving]
        [(first, ids)] = windows
        assert first == 2 * BLOCK
        np.testing.assert_array_equal(ids, arrays["ids"][2 * BLOCK :])


def test_an_exception_in_an_asyncio_block_aborts_both_sides(daemons: Daemons) -> None:
    a, b = daemons

    async def run() -> None:
        async with (
            AsyncClient(a.directory, LAYOUT) as source,
            AsyncClient(b.directory, LAYOUT) as sink,
            await sink.receive("t", source=a.address) as receiving,
        ):
            with pytest.raises(ZeroDivisionError):
                async with await source.send("t") as sending:
                    await sending.ready(0 // sending.sent_tokens)
            with pytest.raises(FerryError) as caught:
                await receiving.wait(20)
            assert caught.value.code == "source_failed"

    asyncio.run(run())


def test_a_snapshot_that_was_overtaken_is_dropped() -> None:
    logic = SendLogic(None, worker.Send(transfer_id="t"))  # type: ignore[arg-type]
    for number, sent in ((5, 50), (3, 30), (6, 60)):
        seen = worker.Snapshot(
            role=Role.SOURCE, transfer_id="t", attempt=0, snapshot=number,
            state=State.TRANSFERRING, sent_tokens=sent,
        )  # fmt: skip
        logic.note(worker.Snapshots(transfers=[seen]))
        assert logic.now.sent_tokens == max(sent, 50)
