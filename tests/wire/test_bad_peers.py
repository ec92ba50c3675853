"""Bad input from other daemons, over the real peer socket and the real data port."""

import os
import socket
from collections.abc import Iterator

import msgpack
import pytest

from kvferry_daemon.transports.tcp.listener import ConnectError, connect
from kvferry_proto import peer, worker
from kvferry_proto.chunk import pack_greeting
from kvferry_proto.states import TERMINAL, Role, State
from live import BLOCK, BOOT_ID, WINDOW, LiveDaemon, RawPeer, RawWorker


@pytest.fixture
def source(daemon: LiveDaemon) -> Iterator[RawWorker]:
    """A source worker with one block of transfer `t` ready."""
    with RawWorker(daemon.directory) as one:
        one.snapshot(worker.Send(transfer_id="t"))
        one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
        one.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
        yield one


@pytest.mark.parametrize(
    "frames",
    [[b""], [b"garbage"], [b"\x91" * 3000], [msgpack.packb({"kind": "pulls"})], [b"a", b"b"]],
    ids=["empty", "garbage", "deep", "fields missing", "two frames"],
)
def test_a_frame_that_is_no_message_is_refused(raw: RawPeer, frames: list[bytes]) -> None:
    answer = raw.raw(*frames)
    assert isinstance(answer, peer.PeerRefused)
    assert answer.error.code == "bad_message"


def test_versions_without_overlap_are_refused_with_both_ranges(raw: RawPeer) -> None:
    fields = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1).model_dump()
    answer = raw.raw(msgpack.packb({**fields, "versions": {"low": 5, "high": 6}}))
    assert answer.error.code == "no_common_version"
    assert "5 to 6" in answer.error.message


def test_a_message_for_an_earlier_life_is_refused(raw: RawPeer) -> None:
    raw.source = "0" * 32
    answer = raw.say(peer.Ping(**raw.boots()))
    assert isinstance(answer, peer.PeerRefused)
    assert answer.error.code == "daemon_restarted"


def test_a_pull_for_nothing_we_know_is_answered_unknown(raw: RawPeer) -> None:
    assert not raw.pull(transfer_id="nobody").known


def test_acknowledging_what_was_never_served_frees_nothing(raw: RawPeer, source: RawWorker) -> None:
    answer = raw.pull(acked_tokens=10 * WINDOW)
    assert answer.error.code == "peer_protocol"
    assert source.poll(Role.SOURCE).base_tokens == 0
    assert source.poll(Role.SOURCE).state is State.BOOTSTRAPPING


def test_wanting_on_a_stream_that_is_not_open_serves_nothing(
    daemon: LiveDaemon, raw: RawPeer, source: RawWorker
) -> None:
    want = peer.Want(first_token=0, tokens=BLOCK, stream=3, connection=77)
    assert raw.pull(want=[want]).available_tokens == BLOCK
    assert raw.pull(number=2, acked_tokens=BLOCK).error is None  # nothing is held as being read
    assert source.poll(Role.SOURCE).base_tokens == BLOCK
    assert "bytes_sent" not in daemon.status().counters


def test_a_second_sink_cannot_take_a_transfer_over(
    daemon: LiveDaemon, raw: RawPeer, source: RawWorker
) -> None:
    assert raw.pull().error is None
    thief = RawPeer(daemon.address)
    thief.source = raw.source
    stranger = "cd" * 16
    done = peer.Done(
        transfer_id="t",
        attempt=0,
        state=State.SUCCESS,
        source_boot_id=raw.source,
        sink_boot_id=stranger,
    )
    refused = thief.say(done)
    assert isinstance(refused, peer.PeerRefused)
    assert refused.error.code == "hello_first"
    thief.say(peer.PeerHello(boot_id=stranger, daemon_id=stranger, life=1))
    assert isinstance(thief.say(done), peer.DoneNoted)
    thief.close()
    assert source.poll(Role.SOURCE).state not in TERMINAL


def data_port(raw: RawPeer) -> tuple[int, bytes]:
    answer = raw.say(peer.OpenStream(stream=0, connection=0, **raw.boots()))
    assert isinstance(answer, peer.Ticket)
    return answer.port, answer.ticket


@pytest.mark.parametrize("says", [b"x" * 64, b"GET / HTTP/1.1\r\n" * 4, pack_greeting(b"n" * 32)])
def test_the_data_port_turns_strangers_away(raw: RawPeer, says: bytes) -> None:
    port, _ = data_port(raw)
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(says)
        sock.settimeout(10)
        assert sock.recv(16) in (b"", b"KVFA\x01" + bytes(11))


def test_a_ticket_is_good_once(raw: RawPeer) -> None:
    port, ticket = data_port(raw)
    connect("127.0.0.1", port, ticket, 5).close()
    with pytest.raises(ConnectError, match="refused the ticket"):
        connect("127.0.0.1", port, ticket, 5)
    with pytest.raises(ConnectError, match="refused the ticket"):
        connect("127.0.0.1", port, os.urandom(32), 5)


def test_an_address_that_swallows_everything_is_called_unreachable(sink: LiveDaemon) -> None:
    """A listener whose queue is full drops every SYN, as a firewall does."""
    with socket.socket() as server, RawWorker(sink.directory) as consumer:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        consumer.snapshot(worker.Receive(transfer_id="t", source=f"tcp://127.0.0.1:{address[1]}"))
        end = consumer.wait_end(Role.SINK)
        for filler in fillers:
            filler.close()
    assert end.error is not None
    assert end.error.code == "peer_unreachable"
    assert "unreachable" in end.error.message
