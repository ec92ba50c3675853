"""A trusted peer that opens data connections without an end."""

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from attacks.scene import without
from kvferry_daemon.core.sink_streams import OF_ONE_MAX
from kvferry_daemon.transports.tcp.listener import ConnectError, connect
from kvferry_proto import peer
from kvferry_proto.errors import Code
from live import BOOT_ID, LiveDaemon, RawPeer

MANY = 60
WAIT_S = 5.0


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
