"""A sink may hear that its connection is open before the source's loop has heard of it."""

import os
from pathlib import Path

from kvferry_daemon.transports.tcp.listener import connect
from kvferry_proto import peer, worker
from kvferry_proto.states import Role
from live import BLOCK, BOOT_ID, WINDOW, LiveDaemon, RawPeer, RawWorker

WAIT_S = 20.0


class Late(LiveDaemon):
    program = (str(Path(__file__).parent / "late_posts.py"),)


def test_what_a_sink_wants_as_soon_as_its_connection_is_open_is_sent(tmp_path: Path) -> None:
    """It was dropped now and then, as wanted on a connection that is not open, until asked again."""
    with Late(tmp_path / "a") as daemon, RawWorker(daemon.directory) as prefill:
        prefill.snapshot(worker.Send(transfer_id="t"))
        seen = prefill.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
        secret = os.urandom(prefill.layout.block_bytes)
        prefill.write_block(seen.runs[0][0], secret)
        prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
        link = RawPeer(daemon.address)
        link.source = link.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)).boot_id
        ticket = link.say(peer.OpenStream(stream=0, connection=0, **link.boots()))
        with connect("127.0.0.1", ticket.port, ticket.ticket, WAIT_S) as data:
            data.settimeout(WAIT_S)
            link.pull(want=[peer.Want(first_token=0, tokens=BLOCK, stream=0, connection=0)])
            found = b""
            while secret not in found:
                part = data.recv(1 << 16)
                assert part
                found += part
        link.close()
