"""Groups of real workers, each rank a client of its own, against real daemons."""

import asyncio
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.processes import kvferry
from client.payloads import LAYOUT, WINDOW, Daemons, payload
from client.ranks import Ranks
from kvferry_client import AsyncClient, FerryError, Role, State, connect
from kvferry_proto.worker import Watched
from live import LiveDaemon

RANKS = 2


def arrays_of(rank: int, tokens: int) -> dict[str, np.ndarray]:
    """Different bytes for every rank."""
    return {name: array + rank for name, array in payload(tokens).items()}


def send(directory: Path, rank: int, tokens: int, **more: Any) -> None:
    with (
        connect(directory, LAYOUT, f"prefill {rank}") as client,
        client.send("t", rank=rank, world_size=RANKS, **more) as sending,
    ):
        sending.fill(0, arrays_of(rank, tokens), {"first_token": 3} if rank == 0 else None)
        sending.finish()
        sending.wait(30)


@pytest.mark.parametrize("handoff", [False, True])
@pytest.mark.parametrize("tokens", [1, 3 * WINDOW + 5])
def test_each_rank_gets_its_own_bytes_in_the_same_windows(
    daemons: Daemons, tokens: int, handoff: bool
) -> None:
    a, b = daemons
    windows: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}
    size = WINDOW // RANKS  # a quota is for the blocks of all ranks

    def receive(rank: int) -> None:
        options: dict[str, Any] = {"rank": rank, "world_size": RANKS, "window_tokens": size}
        parts: dict[str, list[np.ndarray]] = {plane.name: [] for plane in LAYOUT.planes}
        source = None if handoff else a.address
        with (
            connect(b.directory, LAYOUT, f"decode {rank}") as client,
            client.receive("t", source=source, **options) as receiving,
        ):
            for window in receiving:
                windows[rank].append(window.end_token)
                for name, got in parts.items():
                    got.append(window.gather(name))
            assert receiving.aux == {"first_token": 3}
        for name, array in arrays_of(rank, tokens).items():
            np.testing.assert_array_equal(np.concatenate(parts[name]), array)

    sinks = Ranks(receive, RANKS)
    where = b if handoff else a
    Ranks(lambda rank: send(where.directory, rank, tokens, window_tokens=size), RANKS).join()
    sinks.join()
    assert windows[0] == windows[1]
    assert windows[0][-1] == tokens


def test_the_asyncio_client_has_ranks_too(daemons: Daemons) -> None:
    a, b = daemons

    async def prefill(rank: int) -> None:
        async with (
            AsyncClient(a.directory, LAYOUT) as client,
            await client.send("t", rank=rank, world_size=RANKS, window_tokens=32) as sending,
        ):
            await sending.fill(0, arrays_of(rank, 100), {"first_token": 1})
            await sending.finish()

    async def decode(rank: int) -> np.ndarray:
        async with (
            AsyncClient(b.directory, LAYOUT) as client,
            await client.receive(
                "t", source=a.address, rank=rank, world_size=RANKS, window_tokens=32
            ) as receiving,
        ):
            return np.concatenate([window.gather("k") async for window in receiving.windows()])

    async def run() -> list[np.ndarray]:
        sends = [asyncio.ensure_future(prefill(rank)) for rank in range(RANKS)]
        got = await asyncio.gather(*(decode(rank) for rank in range(RANKS)))
        await asyncio.gather(*sends)
        return got

    for rank, got in enumerate(asyncio.run(run())):
        np.testing.assert_array_equal(got, arrays_of(rank, 100)["k"])


def test_ranks_of_different_lengths_all_fail(daemons: Daemons) -> None:
    a, _ = daemons
    with connect(a.directory, LAYOUT) as one, connect(a.directory, LAYOUT) as two:
        first = one.send("t", rank=0, world_size=RANKS, window_tokens=32)
        second = two.send("t", rank=1, world_size=RANKS, window_tokens=32)
        first.fill(0, arrays_of(0, 7), {"first_token": 1})
        first.finish()
        second.fill(0, arrays_of(1, 6))
        second.finish()
        for sending in (first, second):
            with pytest.raises(FerryError) as caught:
                sending.wait(10)
            assert caught.value.code == "total_mismatch"
            assert "6" in caught.value.message
            assert "7" in caught.value.message
            sending.release()


def test_a_rank_that_is_taken_or_cannot_be_is_refused(daemons: Daemons) -> None:
    a, _ = daemons
    with connect(a.directory, LAYOUT) as one, connect(a.directory, LAYOUT) as two:
        sending = one.send("t", rank=0, world_size=RANKS, window_tokens=32)
        for options, code in (
            ({"rank": 0, "world_size": RANKS, "window_tokens": 32}, "rank_taken"),
            ({"rank": 2, "world_size": RANKS, "window_tokens": 32}, "bad_rank"),
            ({"rank": 1, "world_size": 3, "window_tokens": 32}, "group_differs"),
            ({"rank": 64, "world_size": 65}, "bad_message"),
        ):
            with pytest.raises(FerryError) as caught:
                two.send("t", **options)  # type: ignore[arg-type]
            assert caught.value.code == code
        assert not sending.ended
        sending.abort("enough")


def hold(directory: str, rank: int, ready: Any) -> None:
    """A worker that opens its rank and stays."""
    with connect(directory, LAYOUT) as client:
        client.send("t", rank=rank, world_size=RANKS, window_tokens=32)
        ready.set()
        threading.Event().wait()


def test_a_killed_rank_fails_the_others_and_leaves_no_block(daemons: Daemons) -> None:
    a, b = daemons
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    victim = spawn.Process(target=hold, args=(str(a.directory), 1, ready))
    victim.start()
    try:
        with connect(a.directory, LAYOUT) as client, connect(b.directory, LAYOUT) as sink:
            sending = client.send("t", rank=0, world_size=RANKS, window_tokens=32)
            options: dict[str, Any] = {"world_size": RANKS, "window_tokens": 32}
            sinks = [
                sink.receive("t", source=a.address, rank=rank, **options) for rank in range(RANKS)
            ]
            assert ready.wait(30)
            victim.kill()
            with pytest.raises(FerryError) as caught:
                sending.wait(30)
            assert caught.value.code == "worker_lost"
            assert "rank 1 of 2" in caught.value.message
            sending.release()
            for receiving in sinks:
                with pytest.raises(FerryError) as caught:
                    receiving.wait(30)
                assert caught.value.code == "source_failed"
                assert "rank 1 of 2" in caught.value.message
                receiving.release()
    finally:
        victim.kill()
        victim.join()


def test_a_group_goes_on_after_both_daemons_were_killed(tmp_path: Path) -> None:
    tokens, size = 6 * WINDOW + 1, 32
    a, b = LiveDaemon(tmp_path / "a"), LiveDaemon(tmp_path / "b")
    half_way, restarted = threading.Barrier(RANKS + 1), threading.Event()
    got: dict[int, list[np.ndarray]] = {rank: [] for rank in range(RANKS)}
    windows: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}

    def receive(rank: int) -> None:
        with (
            connect(b.directory, LAYOUT) as client,
            client.receive(
                "t", source=a.address, rank=rank, world_size=RANKS, window_tokens=size
            ) as receiving,
        ):
            for window in receiving:
                windows[rank].append(window.end_token)
                got[rank].append(window.gather("k"))
                if len(windows[rank]) == 3:
                    half_way.wait(30)
                    assert restarted.wait(30)

    sources = Ranks(lambda rank: send(a.directory, rank, tokens, window_tokens=size), RANKS)
    sinks = Ranks(receive, RANKS)
    half_way.wait(60)
    for daemon in (a, b):
        daemon.process.kill()
    a, b = a.again(), b.again()
    restarted.set()
    with a, b:
        sources.join()
        sinks.join()
        for rank in range(RANKS):
            np.testing.assert_array_equal(np.concatenate(got[rank]), arrays_of(rank, tokens)["k"])
        assert windows[0] == windows[1]
        for daemon in (a, b):
            daemon.wait_until_free()


def test_operators_see_one_transfer_a_group(daemons: Daemons) -> None:
    a, _ = daemons
    with connect(a.directory, LAYOUT) as client:
        sendings = [
            client.send("t", rank=rank, world_size=RANKS, window_tokens=32) for rank in range(RANKS)
        ]
        seen = client.poll(*[Watched(role=Role.SOURCE, transfer_id="t", rank=r) for r in (0, 1)])
        assert [one.rank for one in seen.transfers] == [0, 1]
        assert a.status().transfers == {State.BOOTSTRAPPING.name.lower(): 1}
        for sending in sendings:
            sending.abort()


def test_operators_see_which_ranks_hold_a_group_up(daemons: Daemons) -> None:
    """A rank is shown what it is to act on when all can act on it; an operator is shown it now."""
    a, b = daemons
    size: dict[str, Any] = {"world_size": RANKS, "window_tokens": 32}

    def held_up(daemon: LiveDaemon, stall: str, behind: list[int]) -> Any:
        return daemon.wait_for_transfer(
            "t", lambda row: (row.snapshot.stall, row.behind) == (stall, behind)
        )

    with connect(a.directory, LAYOUT, "prefill") as client, connect(b.directory, LAYOUT) as sink:
        first = client.send("t", rank=0, **size)
        assert held_up(a, "waiting_for_peer", [1]).workers == ["prefill", ""]
        second = client.send("t", rank=1, **size)
        first.fill(0, arrays_of(0, 32), {"first_token": 1})
        sinks = [sink.receive("t", source=a.address, rank=1, **size)]
        held_up(b, "waiting_for_peer", [0])
        row = held_up(a, "waiting_for_input", [1])
        assert (row.snapshot.available_tokens, row.workers) == (0, ["prefill"] * 2)
        sinks.insert(0, sink.receive("t", source=a.address, rank=0, **size))
        second.fill(0, arrays_of(1, 32))
        assert held_up(b, "waiting_for_resume", [0, 1]).snapshot.sent_tokens == 32
        assert b.status().stalls == {"waiting_for_resume": 1}
        watched = [Watched(role=Role.SINK, transfer_id="t", rank=r, after=1000) for r in (0, 1)]
        sink.poll(watched[0])
        held_up(b, "waiting_for_resume", [1])
        sink.poll(watched[1])
        held_up(b, "waiting_for_resume", [0, 1])
        sinks[0].resume(32)
        held_up(b, "waiting_for_resume", [1])
        out = kvferry("transfers", "t", "--runtime-dir", b.directory).stdout.splitlines()
        assert out[1].split()[-5] == "1", out  # behind it: age, idle, peer, worker
        for one in (first, second, *sinks):
            one.abort()


def test_a_group_that_is_spread_over_daemons_is_told_who_is_missing(tmp_path: Path) -> None:
    """Each daemon has one rank of it; nobody hears of the other before the deadline."""
    with LiveDaemon(tmp_path / "a", stall_s=1) as a, LiveDaemon(tmp_path / "b", stall_s=1) as b:
        clients = [connect(daemon.directory, LAYOUT) for daemon in (a, b)]
        sendings = [
            client.send("t", rank=rank, world_size=RANKS, window_tokens=32)
            for rank, client in enumerate(clients)
        ]
        for rank, sending in enumerate(sendings):
            with pytest.raises(FerryError) as caught:
                sending.wait(20)
            assert caught.value.code == "rank_missing"
            assert f"of 2 ranks, {1 - rank} did not come within 1 s" in caught.value.message
            assert "one daemon" in caught.value.remedy
            sending.release()
        for client, daemon in zip(clients, (a, b), strict=True):
            client.close()
            daemon.wait_until_free()
