"""Polls by status board: the same answers without a message."""

import asyncio
import time
from pathlib import Path

from client.payloads import BLOCK, LAYOUT, WINDOW, Daemons, payload
from client.ranks import Ranks
from kvferry_client import AsyncClient, Client, Role, StallReason, State, connect
from kvferry_proto import worker
from kvferry_proto.worker import Snapshot
from live import LiveDaemon

WAIT_S = 20.0
WATCHED = worker.Watched(role=Role.SOURCE, transfer_id="t")


def by_message(client: Client, watched: worker.Watched = WATCHED) -> Snapshot:
    reply = client.call(worker.Poll(transfers=[watched]))
    assert isinstance(reply, worker.Snapshots)
    return reply.transfers[0].model_copy(update={"slot": None})


def by_board(client: Client, watched: worker.Watched = WATCHED) -> Snapshot:
    """A poll, which has to be answered by the board: the daemon stands still."""
    [seen] = client.poll(watched).transfers
    assert client.board_trouble is None
    return seen.model_copy(update={"slot": None})


def test_what_has_not_changed_is_the_same_object_and_costs_no_message(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client, client.send("t") as sending:
        client.poll(WATCHED)
        daemon.pause()
        [seen] = client.poll(WATCHED).transfers
        assert client.poll(WATCHED).transfers[0] is seen
        assert client.poll(WATCHED.model_copy(update={"after": seen.snapshot})).transfers == []
        assert client.poll(WATCHED, wait_s=5).transfers[0] is seen  # news already
        daemon.resume()
        assert seen.snapshot == sending.snapshot.snapshot


def test_the_board_shows_what_a_message_would_bring(daemon: LiveDaemon, tmp_path: Path) -> None:
    """Through a whole life, on both sides; each time the daemon stands still while we look."""
    with (
        LiveDaemon(tmp_path / "b", lost_s=30) as other,
        connect(daemon.directory, LAYOUT) as source,
        connect(other.directory, LAYOUT) as sink,
    ):
        sinks = WATCHED.model_copy(update={"role": Role.SINK})
        sending = source.send("t")
        receiving = sink.receive("t", source=daemon.address)

        def check() -> None:
            for client, one, watched in ((source, daemon, WATCHED), (sink, other, sinks)):
                client.poll(watched)
                agree(client, one, watched)

        check()
        for first in range(0, 3 * WINDOW, BLOCK):
            sending.fill(first, {k: v[:BLOCK] for k, v in payload(BLOCK).items()})
            check()
            for _ in range(2):
                now = receiving.logic.now
                sink_poll = sinks.model_copy(update={"after": now.snapshot})
                receiving.logic.note(sink.poll(sink_poll, wait_s=0.2))
            receiving.resume(receiving.sent_tokens)
            check()
        sending.finish({"first_token": 7})
        receiving.wait()
        check()
        assert by_message(sink, sinks).aux == {"first_token": 7}
        receiving.release()


def agree(client: Client, daemon: LiveDaemon, watched: worker.Watched) -> None:
    """Compare board and message, of a moment at which nothing changes between the two."""
    until = time.monotonic() + WAIT_S
    while True:
        before = by_message(client, watched)
        seen = by_board(client, watched)
        if by_message(client, watched) == before:
            assert seen == before
            return
        assert time.monotonic() < until


def test_aux_values_are_asked_for_once(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client, client.send("t") as sending:
        client.poll(WATCHED)
        sending.fill(0, payload(3), {"first_token": 5})
        assert client.poll(WATCHED).transfers[0].aux == {"first_token": 5}
        client.poll(WATCHED)
        sending.fill(3, payload(4))
        daemon.pause()
        [seen] = client.poll(WATCHED).transfers
        daemon.resume()
        assert (seen.available_tokens, seen.aux) == (7, {"first_token": 5})


def test_several_transfers_in_one_poll_and_only_the_unknown_are_asked_for(
    daemon: LiveDaemon,
) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        client.send("t").fill(0, payload(2))
        client.send("u")
        both = [WATCHED, WATCHED.model_copy(update={"transfer_id": "u"})]
        client.poll(WATCHED)
        assert [one.transfer_id for one in client.poll(*both).transfers] == ["t", "u"]
        daemon.pause()
        assert [one.transfer_id for one in client.poll(*both).transfers] == ["t", "u"]
        daemon.resume()
        three = [*both, WATCHED.model_copy(update={"transfer_id": "none"})]
        reply = client.poll(*three)
        assert [one.transfer_id for one in reply.transfers] == ["t", "u"]
        assert [one.error.code for one in reply.refused] == ["unknown_transfer"]


def test_a_failure_says_why(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        sending = client.send("t")
        client.poll(WATCHED)
        client.call(worker.Abort(role=Role.SOURCE, transfer_id="t", reason="enough"))
        [seen] = client.poll(WATCHED).transfers
        assert seen.state is State.FAILED
        assert seen.error is not None
        assert "enough" in seen.error.message
        sending.release()


def test_the_asyncio_client_looks_at_the_board_too(daemon: LiveDaemon) -> None:
    async def run() -> None:
        async with AsyncClient(daemon.directory, LAYOUT) as client:
            await client.send("t")
            await client.poll(WATCHED)
            daemon.pause()
            [seen] = (await client.poll(WATCHED)).transfers
            assert (await client.poll(WATCHED)).transfers[0] is seen
            assert client.board_trouble is None
            daemon.resume()

    asyncio.run(run())


def test_a_worker_that_only_looks_at_the_board_is_not_taken_for_lost(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", lost_s=2) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        client.send("t")
        until = time.monotonic() + 5
        while time.monotonic() < until:
            [seen] = client.poll(WATCHED).transfers
            assert seen.state is not State.FAILED, seen.error


def test_ranks_that_only_poll_take_the_same_windows_over(daemons: Daemons) -> None:
    """A rank says by message that it has acted; else nobody would see anything new."""
    a, b = daemons
    tokens = 3 * WINDOW + 5
    taken: dict[int, list[int]] = {0: [], 1: []}

    def send(rank: int) -> None:
        with (
            connect(a.directory, LAYOUT) as client,
            client.send("t", rank=rank, world_size=2, window_tokens=WINDOW) as sending,
        ):
            sending.fill(0, payload(tokens), {"first_token": 1})

    def receive(rank: int) -> None:
        with connect(b.directory, LAYOUT) as client:
            receiving = client.receive(
                "t", source=a.address, rank=rank, world_size=2, window_tokens=WINDOW // 2
            )
            now = receiving.snapshot
            until = time.monotonic() + WAIT_S
            while now.state is not State.SUCCESS:
                assert time.monotonic() < until, now
                assert now.state is not State.FAILED, now.error
                watched = worker.Watched(
                    role=Role.SINK, transfer_id="t", rank=rank, after=now.snapshot
                )
                for seen in client.poll(watched).transfers:
                    assert seen.snapshot > now.snapshot
                    now = seen
                if now.stall is StallReason.WAITING_FOR_RESUME:
                    taken[rank].append(now.sent_tokens)
                    receiving.resume(now.sent_tokens)
            receiving.release()

    sinks = Ranks(receive, 2)
    Ranks(send, 2).join()
    sinks.join()
    assert sorted(set(taken[0])) == sorted(set(taken[1]))
    assert len(set(taken[0])) >= 3
