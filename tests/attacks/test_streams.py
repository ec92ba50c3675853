"""A trusted peer that opens data connections without an end, or asks for too much on them."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from attacks.scene import without
from kvferry_daemon.core.sink_streams import OF_ONE_MAX
from kvferry_daemon.transports.tcp.listener import ConnectError, connect
from kvferry_proto import peer, worker
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, State
from live import BLOCK, BOOT_ID, LiveDaemon, RawPeer, RawWorker

MANY = 60
WAIT_S = 5.0
OTHER_ID = "cd" * 16


def link(raw: RawPeer, boot_id: str = BOOT_ID) -> dict[str, Any]:
    """One more link of the same daemon; the boot ids that its messages bear."""
    welcome = raw.say(peer.PeerHello(boot_id=boot_id, daemon_id=BOOT_ID, life=1))
    assert isinstance(welcome, peer.PeerWelcome)
    return {"source_boot_id": welcome.boot_id, "sink_boot_id": boot_id}


def ticket_for(
    raw: RawPeer, boots: dict[str, Any], stream: int, connection: int
) -> peer.Ticket | peer.PeerRefused:
    answer = raw.say(peer.OpenStream(stream=stream, connection=connection, **boots))
    assert isinstance(answer, peer.Ticket | peer.PeerRefused)
    return answer


@contextmanager
def shown(tickets: list[peer.Ticket]) -> Iterator[list[socket.socket]]:
    """Every one of them, and the connections that come of it."""
    with ExitStack() as stack:
        found = []
        for one in tickets:
            with contextlib.suppress(ConnectError):
                sock = connect("127.0.0.1", one.port, one.ticket, WAIT_S)
                found.append(stack.enter_context(sock))
        yield found


def threads(daemon: LiveDaemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))


def test_a_stream_has_one_data_connection_however_many_tickets_were_asked_for(
    tmp_path: Path,
) -> None:
    for defence, is_bound in (("streams_are_free", False), (None, True)):
        with without(defence)(tmp_path / str(defence)) as daemon:
            raw = RawPeer(daemon.address)
            boots = link(raw)
            before = threads(daemon)
            asked = [ticket_for(raw, boots, 0, number) for number in range(1, MANY)]
            tickets = [one for one in asked if isinstance(one, peer.Ticket)]
            with shown(tickets):
                time.sleep(0.3)  # threads of those that were thrown out end
                grown = threads(daemon) - before
            raw.close()
            assert (grown <= 8) is is_bound, grown  # some are the interpreter's and the ledger's


def test_one_peer_has_so_many_data_connections_and_is_told_so(tmp_path: Path) -> None:
    """Tickets that nobody has shown yet count, too; links cost it nothing."""
    for defence, is_bound in (("streams_are_free", False), (None, True)):
        with without(defence)(tmp_path / str(defence)) as daemon:
            raw = RawPeer(daemon.address)
            answers = []
            for number in range(OF_ONE_MAX // peer.STREAMS_MAX + 1):
                boots = link(raw, f"{number:032x}")
                answers += [ticket_for(raw, boots, one, 0) for one in range(peer.STREAMS_MAX)]
            refused = [one for one in answers if isinstance(one, peer.PeerRefused)]
            raw.close()
            assert bool(refused) is is_bound
            assert {one.error.code for one in refused} <= {Code.RESOURCE_EXHAUSTED}
            counted = daemon.status().counters.get("peer_refused_resource_exhausted", 0)
            assert counted == len(refused)
            if is_bound:
                assert len(answers) - len(refused) == OF_ONE_MAX


def test_what_is_wanted_on_connections_that_nobody_opened_costs_nothing(tmp_path: Path) -> None:
    """One frame of 4,000 wants: each was queued, and with each all of them were looked at."""
    spent_s: dict[str | None, float] = {}
    for defence in ("wants_are_queued", None):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as one,
        ):
            one.snapshot(worker.Send(transfer_id="t"))
            one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens > 0)
            one.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
            raw = RawPeer(daemon.address)
            boots = link(raw)
            pulls = [a_pull_for_connections(raw, number) for number in range(4)]
            before_s = cpu_s(daemon)
            answer = raw.say(peer.Pulls(pulls=pulls, **boots))
            assert isinstance(answer, peer.Progresses)
            spent_s[defence] = cpu_s(daemon) - before_s
            raw.close()
            dropped = daemon.status().counters.get("wants_dropped", 0)
            assert dropped == (4000 if defence is None else 0)
    assert 3 * spent_s[None] < spent_s["wants_are_queued"], spent_s
    assert spent_s[None] < 1


@pytest.mark.parametrize("pulled", [False, True])
def test_nobody_says_of_a_source_that_it_has_arrived_before_it_can_have(
    tmp_path: Path, pulled: bool
) -> None:
    """Its worker would be told of a success, and the sink that it is meant for find it gone."""
    for defence, ends in (("anybody_ends_sources", True), (None, False)):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as one,
        ):
            one.snapshot(worker.Send(transfer_id="t"))  # its length is not known yet
            raw = RawPeer(daemon.address)
            boots = link(raw)
            if pulled:
                raw.say(peer.Pulls(pulls=[raw.a_pull()], **boots))
            done = peer.Done(transfer_id="t", attempt=0, state=State.SUCCESS, **boots)
            assert isinstance(raw.say(done), peer.DoneNoted)
            raw.close()
            assert (one.poll(Role.SOURCE).state is State.SUCCESS) is ends
            assert daemon.status().counters.get("dones_dropped", 0) == (not ends)


def says_success(daemon: LiveDaemon, daemon_id: str) -> None:
    """Go by that daemon, and say of the transfer that it has arrived."""
    raw = RawPeer(daemon.address)
    hello = peer.PeerHello(boot_id=daemon_id, daemon_id=daemon_id, life=1)
    boots = {"source_boot_id": raw.say(hello).boot_id, "sink_boot_id": daemon_id}
    done = peer.Done(transfer_id="t", attempt=0, state=State.SUCCESS, **boots)
    assert isinstance(raw.say(done), peer.DoneNoted)
    raw.close()


@pytest.mark.parametrize("in_its_next_life", [False, True])
def test_nobody_but_its_sink_says_late_of_a_source_that_it_has_arrived(
    tmp_path: Path, in_its_next_life: bool
) -> None:
    """That its lease ran out was only a guess: its own sink's word counts when it comes."""
    for defence, ends in (("anybody_is_believed_late", True), (None, False)):
        with ExitStack() as stack:
            daemon = stack.enter_context(without(defence)(tmp_path / str(defence), lease_s=1))
            with RawWorker(daemon.directory) as one:
                one.snapshot(worker.Send(transfer_id="t", total_tokens=BLOCK))
                raw = RawPeer(daemon.address)
                raw.say(peer.Pulls(pulls=[raw.a_pull()], **link(raw)))
                raw.close()
                error = one.wait_end(Role.SOURCE).error
                assert error is not None
                assert error.code == "lease_expired"
                one.snapshot(worker.Release(transfer_id="t", role=Role.SOURCE))
            if in_its_next_life:
                daemon.process.kill()
                daemon = stack.enter_context(daemon.again())
            for who, counts in ((OTHER_ID, ends), (BOOT_ID, True)):
                says_success(daemon, who)
                [seen] = [row.snapshot.state for row in daemon.transfers("t")]
                assert (seen is State.SUCCESS) is counts
            assert daemon.status().counters.get("dones_dropped", 0) == (not ends)


def a_pull_for_connections(raw: RawPeer, number: int) -> peer.Pull:
    """It wants one block, on each of a thousand connections."""
    numbers = range(1000 * number, 1000 * (number + 1))
    want = [peer.Want(first_token=0, tokens=BLOCK, stream=0, connection=one) for one in numbers]
    return raw.a_pull(number=number + 1, want=want)


def cpu_s(daemon: LiveDaemon) -> float:
    """What the daemon's threads have worked so far."""
    words = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")
