"""Who is let in, and has the daemon keep more and more: sessions, links, ends, polls, plans, files."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attacks.scene import started, without
from attacks.switched_off.bounds import FEW_A_S
from kvferry_client.session import Lock
from kvferry_daemon.core.node import ANSWERS_A_TURN_BYTES
from kvferry_daemon.core.plans import NEW_MAX
from kvferry_daemon.core.polls import WATCHED_MAX, WATCHED_OF_ONE_MAX
from kvferry_daemon.core.sink_desk import PEERS_MAX, PEERS_OF_ONE_MAX
from kvferry_daemon.core.tombstones import TOMBSTONES_MAX, UNKNOWN_MAX
from kvferry_daemon.core.welcome import SESSIONS_OF_ONE_MAX
from kvferry_daemon.links.liveness import KEPT_MAX, UNSEEN_S
from kvferry_proto import peer, worker
from kvferry_proto.errors import AGAIN_S, Code
from kvferry_proto.fields import AUX_BYTES_MAX
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State
from kvferry_proto.worker import BATCH_MAX, POLL_MAX
from live import BLOCK, BOOT_ID, LAYOUT, LiveDaemon, RawPeer, RawWorker

OURSELVES = f"{os.getuid()}:{os.getgid()}"
WAIT_S = 30.0
IN_FLIGHT = 256
AGAIN = 8
ENDS = 8 * IN_FLIGHT
PULLS = 4 * NEW_MAX
WATCHED = POLL_MAX // 4  # by each poll: fewer transfers that grow the daemon, too
NEVER = 1 << 40  # no snapshot has such a number
MARKS = 4
SPARE = 8  # descriptors of the daemon's own that come and go
LARGE = Layout(
    planes=(Plane(name="kv", dtype=Dtype.UINT8),), aux=tuple("abcd"), block_size_tokens=BLOCK
)
LARGE_AUX: dict[str, int | float | str | bytes] = {
    name: bytes(AUX_BYTES_MAX // len(LARGE.aux)) for name in LARGE.aux
}
ANSWERS = ANSWERS_A_TURN_BYTES // AUX_BYTES_MAX


def until(condition: Callable[[], bool]) -> None:
    """Look until it is so."""
    until_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def descriptors(daemon: LiveDaemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def exhausted(replies: list[Any]) -> int:
    """How many of these are refused; for no other reason than that it is too much."""
    errors = [reply.error for reply in replies if isinstance(reply, worker.Failure)]
    assert {error.code for error in errors} <= {Code.RESOURCE_EXHAUSTED}
    assert {error.retry_after_s for error in errors} <= {AGAIN_S}
    return len(errors)


def test_a_process_has_so_many_sessions_and_others_still_join(tmp_path: Path) -> None:
    most = SESSIONS_OF_ONE_MAX + 8
    for defence, told in (("processes_have_any_sessions", "resource_exhausted"), (None, "welcome")):
        with (
            without(defence)(tmp_path / str(defence), workers_max=most) as daemon,
            RawWorker(daemon.directory, hello=False) as hog,
        ):
            locks = [Lock(daemon.directory) for _ in range(most)]
            hellos = [worker.Hello(lock=lock.name, layout=LAYOUT) for lock in locks]
            refused = exhausted([hog.call(hello) for hello in hellos])
            assert daemon.status().workers == most - refused
            assert refused == (0 if defence else most - SESSIONS_OF_ONE_MAX)
            with started(OURSELVES, "hello", daemon.directory) as other:
                assert other.communicate(timeout=WAIT_S)[0].strip() == told
            for lock in locks:
                lock.release(is_known=True)


def test_a_process_names_so_many_sources_and_others_still_name_theirs(tmp_path: Path) -> None:
    for defence, told in (("anybody_names_any_sources", "resource_exhausted"), (None, "open")):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as hog,
        ):
            replies: list[Any] = []
            for first in range(0, PEERS_MAX, BATCH_MAX // 2):
                calls: list[worker.Verb] = []
                for number in range(first, min(first + BATCH_MAX // 2, PEERS_MAX)):
                    name, host = f"t{number}", f"127.1.{number >> 8}.{number & 255}"
                    calls.append(worker.Receive(transfer_id=name, source=f"tcp://{host}:9"))
                    calls.append(worker.Abort(transfer_id=name, role=Role.SINK))
                replies += hog.call(worker.Batch(calls=calls)).replies[::2]
            refused = exhausted(replies)
            assert refused == (0 if defence else PEERS_MAX - PEERS_OF_ONE_MAX)
            assert len(daemon.status().peers) == PEERS_MAX - refused
            asked = ("one-more", "", "tcp://127.2.0.0:9")
            with started(OURSELVES, "receive", daemon.directory, *asked) as other:
                assert other.stdout is not None
                assert other.stdout.readline().strip() == told


def forgets(daemon: LiveDaemon, all_but: int) -> None:
    """Until it remembers no more transfers than these."""
    until(lambda: daemon.status().transfers["failed"] <= all_but)


def test_ends_of_what_nobody_opened_drive_out_no_end_of_a_workers_own(tmp_path: Path) -> None:
    for defence in ("unknown_ends_are_not_counted", "unknown_ends_have_no_rate"):
        counts = defence != "unknown_ends_are_not_counted"
        with (
            without(defence)(tmp_path / defence, messages_a_s=1_000_000) as daemon,
            RawWorker(daemon.directory) as source,
        ):
            source.snapshot(worker.Send(transfer_id="own"))
            source.snapshot(worker.Abort(transfer_id="own", role=Role.SOURCE))
            source.snapshot(worker.Release(transfer_id="own", role=Role.SOURCE))
            hog = joined(daemon)
            for first in range(0, TOMBSTONES_MAX, IN_FLIGHT):
                assert ends(hog, range(first, first + IN_FLIGHT)) == IN_FLIGHT
            hog.close()
            forgets(daemon, all_but=UNKNOWN_MAX + 1 if counts else TOMBSTONES_MAX)
            own = worker.Watched(role=Role.SOURCE, transfer_id="own")
            reply = source.call(worker.Poll(transfers=[own]))
            told = [one.error.code for one in (*reply.transfers, *reply.refused)]
            assert told == ["aborted" if counts else "unknown_transfer"]


def joined(daemon: LiveDaemon) -> RawPeer:
    """A daemon that has said hello."""
    one = RawPeer(daemon.address)
    one.source = one.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)).boot_id
    return one


def ends(one: RawPeer, names: Iterable[object]) -> int:
    """Say that these have ended; of how many it was noted before the next message was answered."""
    for name in names:
        over: dict[str, Any] = {"state": State.FAILED, "attempt": 0, **one.boots()}
        done = peer.Done(transfer_id=f"no{name}", **over)
        one.socket.send(peer.MESSAGES.encode(done))
    one.socket.send(peer.MESSAGES.encode(peer.Ping(**one.boots())))
    noted = 0
    while (told := one.next()).kind != "pong":
        assert told.kind == "done_noted"
        noted += 1
    return noted


def test_a_peer_ends_so_many_that_nobody_knows_a_second_and_the_rest_later(tmp_path: Path) -> None:
    for defence in ("unknown_ends_have_no_rate", "unknown_ends_are_few"):
        with without(defence)(tmp_path / defence, messages_a_s=1_000_000) as daemon:
            hog = joined(daemon)
            begun_s = time.monotonic()
            parts = [range(first, first + IN_FLIGHT) for first in range(0, ENDS, IN_FLIGHT)]
            noted = sum(ends(hog, part) for part in parts)
            most = FEW_A_S * (1 + time.monotonic() - begun_s) + 1
            assert (noted > most) is (defence == "unknown_ends_have_no_rate")
            over_rate = daemon.status().counters.get("dones_over_rate", 0)
            assert noted + over_rate == ENDS
            while ends(hog, ["more"]) == 0:
                assert time.monotonic() - begun_s < WAIT_S
            hog.close()


def test_an_end_that_is_said_again_and_again_is_kept_once(tmp_path: Path) -> None:
    for defence in ("late_ends_are_noted_again", None):
        with without(defence)(tmp_path / str(defence), messages_a_s=1_000_000) as daemon:
            hog = joined(daemon)
            assert ends(hog, ["one"]) == 1
            before = daemon.status().counters["ledger_commits"]
            for _ in range(AGAIN):
                assert ends(hog, ["one"]) == 1
            more = daemon.status().counters["ledger_commits"] - before
            assert (more > 0) is (defence is not None)
            hog.close()


def waits(one: RawWorker, poll: worker.Poll, times: int = 1) -> list[Any]:
    """Send a poll that nothing answers, again and again; what it was answered at once."""
    frame = worker.CALLS.encode(poll.model_copy(update={"call": 1}))
    beat = worker.CALLS.encode(worker.Heartbeat())
    told: list[Any] = []
    for _ in range(times):
        one.socket.send(frame)
        one.socket.send(beat)
        while (reply := one.reply(WAIT_S)).call:  # until the beat is answered
            told.append(reply)
    return told


def test_a_worker_waits_for_so_many_transfers_and_others_still_wait(tmp_path: Path) -> None:
    sends = [worker.Send(transfer_id=f"t{number}") for number in range(WATCHED)]
    names = [send.transfer_id for send in sends]
    watched = [worker.Watched(role=Role.SOURCE, transfer_id=name, after=NEVER) for name in names]
    all_of_them = worker.Poll(transfers=watched, wait_s=60.0)
    for defence in ("workers_watch_all", None):
        with (
            without(defence)(tmp_path / str(defence), lost_s=60) as daemon,
            RawWorker(daemon.directory) as hog,
        ):
            for first in range(0, WATCHED, BATCH_MAX):
                some = list[worker.Verb](sends[first : first + BATCH_MAX])
                replies = hog.call(worker.Batch(calls=some)).replies
                assert {reply.kind for reply in replies} == {"snapshots"}
            polls = WATCHED_MAX // WATCHED
            told = waits(hog, all_of_them, polls)
            over = 0 if defence else polls - WATCHED_OF_ONE_MAX // WATCHED
            assert exhausted(told) == len(told) == over
            with RawWorker(daemon.directory) as other:
                other.snapshot(worker.Send(transfer_id="other"))
                own = worker.Watched(role=Role.SOURCE, transfer_id="other", after=NEVER)
                told = waits(other, worker.Poll(transfers=[own], wait_s=60.0))
                assert exhausted(told) == len(told) == (1 if defence else 0)


def test_one_change_answers_so_many_polls_and_the_others_ask_again(tmp_path: Path) -> None:
    polls = 2 * ANSWERS
    for defence in ("polls_are_answered_at_once", None):
        with (
            without(defence)(tmp_path / str(defence), lost_s=60) as daemon,
            RawWorker(daemon.directory, LARGE) as one,
        ):
            one.snapshot(worker.Send(transfer_id="t", aux=LARGE_AUX))
            seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0)
            own = worker.Watched(role=Role.SOURCE, transfer_id="t", after=seen.snapshot)
            assert waits(one, worker.Poll(transfers=[own], wait_s=60.0), polls) == []
            one.socket.send(worker.CALLS.encode(worker.Abort(transfer_id="t", role=Role.SOURCE)))
            told = [one.reply(WAIT_S) for _ in range(polls + 1)]
            assert {reply.kind for reply in told} == {"snapshots"}
            full = sum(bool(reply.transfers) for reply in told if reply.call)
            assert full == (polls if defence else ANSWERS)


def test_a_peer_has_so_many_new_layouts_worked_out_and_no_more(tmp_path: Path) -> None:
    for defence in ("every_layout_is_worked_out", None):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as source,
        ):
            source.snapshot(worker.Send(transfer_id="t"))
            hog = RawPeer(daemon.address)
            hog.source = hog.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)).boot_id
            for number in range(PULLS):
                plane = Plane(name=f"p{number}", dtype=Dtype.UINT8)
                kind = Layout(planes=(plane,), block_size_tokens=BLOCK)
                pull = hog.a_pull(number=number, layout_digest=kind.digest, layout=kind)
                hog.socket.send(peer.MESSAGES.encode(peer.Pulls(pulls=[pull], **hog.boots())))
            hog.socket.send(peer.MESSAGES.encode(peer.Ping(**hog.boots())))
            told: list[peer.Progress] = []
            while isinstance(answer := hog.next(), peer.Progresses):
                told += answer.progresses
            assert {one.error.code for one in told if one.error} == {"layout_mismatch"}
            refused = daemon.status().counters.get("plans_refused", 0)
            assert len(told) + refused == PULLS
            if defence:
                assert refused == 0
            else:
                assert NEW_MAX <= len(told) < PULLS / 2  # one more each four seconds
            hog.close()


def age(path: Path) -> None:
    """Let a file look old enough to be swept."""
    made_s = path.lstat().st_mtime - 2 * UNSEEN_S
    os.utime(path, (made_s, made_s))


def removes(*paths: Path) -> None:
    """Until none of these files is there."""
    until(lambda: not any(path.exists() for path in paths))


def opens(daemon: LiveDaemon, least: int) -> None:
    """Until the daemon has so many descriptors."""
    until(lambda: descriptors(daemon) >= least)


def let_it_look(daemon: LiveDaemon) -> None:
    """Until it has removed one file that nobody holds after the other, MARKS of them."""
    for number in range(MARKS):
        mark = daemon.directory / "workers" / f"mark{number}"
        mark.touch()
        age(mark)
        removes(mark)


@contextmanager
def held(daemon: LiveDaemon, count: int) -> Iterator[None]:
    """So many files in `workers/`, of no session, that look old enough to be swept."""
    locks = [Lock(daemon.directory) for _ in range(count)]
    for path in (daemon.directory / "workers").iterdir():
        age(path)
    yield
    for lock in locks:
        lock.release(is_known=False)


def test_files_that_somebody_holds_cost_so_many_descriptors(tmp_path: Path) -> None:
    many = 2 * KEPT_MAX
    for defence, most in (("locks_of_nobody_are_kept", many), (None, KEPT_MAX)):
        with without(defence)(tmp_path / str(defence)) as daemon:
            before = descriptors(daemon)
            with held(daemon, many):
                opens(daemon, before + most - SPARE)
                let_it_look(daemon)
                assert descriptors(daemon) - before <= most + SPARE


@pytest.mark.parametrize("defence", ["locks_have_any_time", None])
def test_files_from_the_future_do_not_stay(tmp_path: Path, defence: str | None) -> None:
    with without(defence)(tmp_path / "a") as daemon:
        found = [daemon.directory / "workers" / f"future{number}" for number in range(KEPT_MAX)]
        for path in found:
            path.touch()
            os.utime(path, (1 << 33, 1 << 33))
        if defence is None:
            removes(*found)
            return
        let_it_look(daemon)
        assert all(path.exists() for path in found)
