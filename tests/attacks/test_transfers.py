"""Workers of one daemon: another one's transfers, and what lies in blocks that were another one's."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.scene import OTHER, stranger, without
from kvferry_client import FerryError, connect
from kvferry_client.views import WindowView
from kvferry_daemon.transports.tcp.listener import connect as open_data
from kvferry_proto import peer, worker
from kvferry_proto.chunk import HEADER_BYTES
from kvferry_proto.states import TERMINAL, Role
from live import BLOCK, BOOT_ID, LAYOUT, WINDOW, LiveDaemon, RawPeer, RawWorker

WORKERS = 47001
SECRET = b"what another request was about. "
ALL_TOKENS = 2 * WINDOW
PATIENT = {"lost_s": 60}  # with who says nothing while another one attacks
ONE_ROLE = {**PATIENT, "pool_tokens": ALL_TOKENS, "source_share": 1}
FILLED = SECRET * (LAYOUT.block_bytes // len(SECRET))
WINDOW_BYTES = HEADER_BYTES + WINDOW // BLOCK * LAYOUT.block_bytes
DATA_S = 10.0


def verbs() -> list[Any]:
    """All that a worker may do with a transfer; the last one ends it."""
    return [
        worker.Send(transfer_id="t"),
        worker.Receive(transfer_id="t"),
        worker.Ready(transfer_id="t", ready_tokens=BLOCK),
        worker.Resume(transfer_id="t", sent_tokens=0),
        worker.Release(transfer_id="t", role=Role.SINK),
        worker.Abort(transfer_id="t", role=Role.SOURCE),
    ]


def test_a_worker_can_do_nothing_with_another_ones_transfer(tmp_path: Path) -> None:
    for defence in ("transfers_are_everybodys", None):
        with (
            without(defence)(tmp_path / str(defence), **PATIENT) as daemon,
            RawWorker(daemon.directory) as victim,
            RawWorker(daemon.directory) as thief,
        ):
            victim.snapshot(worker.Send(transfer_id="t"))
            victim.snapshot(worker.Receive(transfer_id="t"))
            before = victim.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
            watched = worker.Watched(role=Role.SOURCE, transfer_id="t")
            seen = thief.call(worker.Poll(transfers=[watched]))
            assert bool(seen.transfers) is (defence is not None)
            replies = [thief.call(call) for call in verbs()]
            if defence is not None:
                assert {reply.kind for reply in replies} == {"snapshots"}
                assert victim.poll(Role.SOURCE).state in TERMINAL
                continue
            assert {reply.error.code for reply in replies} == {"not_your_transfer"}
            assert victim.poll(Role.SOURCE) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")
def test_a_higher_attempt_of_another_user_ends_nothing(place: Path) -> None:
    """Of its own user it does, from whatever session: a worker that was started again goes on."""
    for defence, told in (("anybody_retries", "snapshots"), (None, "not_your_transfer")):
        with (
            without(defence)(place / str(defence), worker_group=WORKERS, **PATIENT) as daemon,
            RawWorker(daemon.directory) as victim,
            RawWorker(daemon.directory) as again,
        ):
            victim.snapshot(worker.Send(transfer_id="t"))
            assert stranger(OTHER, "retry", daemon.directory, "t", "1", gid=WORKERS) == told
            assert (victim.poll(Role.SOURCE).state in TERMINAL) is (defence is not None)
            if defence is None:
                again.snapshot(worker.Send(transfer_id="t", attempt=1))
                assert victim.poll(Role.SOURCE).state in TERMINAL


def take_all(one: RawWorker, transfer_id: str) -> list[int]:
    """Open a source with a window of all blocks; those it has."""
    one.snapshot(worker.Send(transfer_id=transfer_id, window_tokens=ALL_TOKENS))
    filled = lambda seen: seen.allocated_tokens == ALL_TOKENS
    return [block for _, block in one.window(one.wait_for(Role.SOURCE, filled, transfer_id))]


def leave_behind(one: RawWorker, transfer_id: str) -> None:
    """A request comes, fills every block, and goes."""
    for block in take_all(one, transfer_id):
        one.write_block(block, FILLED)
    one.snapshot(worker.Abort(transfer_id=transfer_id, role=Role.SOURCE))
    one.snapshot(worker.Release(transfer_id=transfer_id, role=Role.SOURCE))


def test_a_request_finds_nothing_of_the_one_before_it_in_its_blocks(tmp_path: Path) -> None:
    for defence, left in (("no_zeroing", FILLED), (None, bytes(LAYOUT.block_bytes))):
        with (
            without(defence)(tmp_path / str(defence), **ONE_ROLE) as daemon,
            RawWorker(daemon.directory) as victim,
            RawWorker(daemon.directory) as thief,
        ):
            leave_behind(victim, "before")
            blocks = take_all(thief, "after")
            assert sorted(blocks) == list(range(ALL_TOKENS // BLOCK))
            assert {thief.block(block) for block in blocks} == {left}


def stolen(daemon: LiveDaemon, *, is_due: bool) -> bytes:
    """What another daemon is sent that asks for a window of transfer `t`; ``is_due``: all of it."""
    thief = RawPeer(daemon.address)
    thief.source = thief.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)).boot_id
    ticket = thief.say(peer.OpenStream(stream=0, connection=0, **thief.boots()))
    want = peer.Want(first_token=0, tokens=WINDOW, stream=0, connection=0)
    with open_data("127.0.0.1", ticket.port, ticket.ticket, DATA_S) as data:
        data.settimeout(DATA_S)
        thief.pull(want=[want])
        if not is_due:  # a later connection ends this one, with what was asked for
            ticket = thief.say(peer.OpenStream(stream=0, connection=1, **thief.boots()))
            open_data("127.0.0.1", ticket.port, ticket.ticket, DATA_S).close()
        found = b""
        while len(found) < WINDOW_BYTES and (part := data.recv(1 << 16)):
            found += part
    thief.close()
    assert is_due == (len(found) >= WINDOW_BYTES)
    return found


def test_a_peer_that_asks_for_what_was_never_written_learns_of_no_other_request(
    tmp_path: Path,
) -> None:
    """Its own worker says that tokens are ready that it has not written."""
    for defence in ("no_zeroing", None):
        with (
            without(defence)(tmp_path / str(defence), **ONE_ROLE) as daemon,
            RawWorker(daemon.directory) as victim,
            RawWorker(daemon.directory) as thief,
        ):
            leave_behind(victim, "before")
            thief.snapshot(worker.Send(transfer_id="t"))
            thief.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
            thief.snapshot(worker.Ready(transfer_id="t", ready_tokens=WINDOW))
            assert (SECRET in stolen(daemon, is_due=True)) is (defence is not None)


def test_a_peer_is_sent_nothing_of_a_window_that_is_not_ready(tmp_path: Path) -> None:
    for defence in ("all_is_served", None):
        with (
            without(defence)(tmp_path / str(defence), **PATIENT) as daemon,
            RawWorker(daemon.directory) as victim,
        ):
            victim.snapshot(worker.Send(transfer_id="t"))
            seen = victim.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
            for _, block in victim.window(seen):
                victim.write_block(block, FILLED)  # and does not say so: it is still at it
            found = stolen(daemon, is_due=defence is not None)
            assert (SECRET in found) is (defence is not None)


def test_a_view_ends_with_the_tokens_that_have_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last block has room for more; that it is empty, too, is the daemon's doing."""
    tokens = BLOCK + 3
    arrays = {"kv": np.ones((tokens, 8), np.int32), "ids": np.ones(tokens, np.int64)}
    for defence, left in (("no_zeroing", np.frombuffer(SECRET, np.int32)), (None, 0)):
        with (
            without(defence)(tmp_path / str(defence), **PATIENT) as daemon,
            connect(daemon.directory, LAYOUT) as client,
        ):
            with RawWorker(daemon.directory) as victim:
                leave_behind(victim, "before")
            with client.send("t") as sending, client.receive("t") as receiving:
                sending.fill(0, arrays)
                sending.finish()
                window = next(receiving.windows())
                assert (window.gather("kv") == 1).all()
                assert (window.tokens, window.runs[0].blocks) == (tokens, 2)
                with pytest.raises(FerryError, match=rf"are not in \[0, {tokens}\)"):
                    window.part(0, 2 * BLOCK)
                with monkeypatch.context() as without_it:
                    without_it.setattr(WindowView, "_check_inside", lambda *_: None)
                    assert (window.part(tokens, 2 * BLOCK).gather("kv") == left).all()
