"""What msgpack lets through and messages must not have, on the three sockets of a daemon."""

from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from attacks.scene import without
from kvferry_proto import control, peer, worker
from live import BOOT_ID, LiveDaemon, RawPeer, RawWorker

DEPTH = 200
GOOD = ["snapshots", "pong", "transfers"]


def packed(value: object) -> bytes:
    found: bytes = msgpack.packb(value)
    return found


NESTED = b"\x91" * DEPTH + b"\xc0"
HIDDEN = {  # behind a field that nobody reads, where no type of a message would see it
    "nan": packed(float("nan")),
    "infinity": packed(float("-inf")),
    "extension": packed(msgpack.ExtType(5, b"x")),
    "timestamp": packed(msgpack.Timestamp(1)),
    "depth": NESTED,
    "key of bytes": b"\x81" + packed(b"k") + b"\x01",
    "key of a number": b"\x81\x07\x01",
    "doubled key": b"\x82" + (packed("k") + b"\x01") * 2,
}


def hiding(message: bytes, hidden: bytes) -> bytes:
    """The same message, of fewer than 15 fields, with one field more."""
    assert 0x80 <= message[0] < 0x8F
    return bytes([message[0] + 1]) + message[1:] + packed("unknown") + hidden


def doubled(message: bytes, field: str, value: object) -> bytes:
    """The same message, with a field that stands in it already: the last one counts in msgpack."""
    return bytes([message[0] + 1]) + message[1:] + packed(field) + packed(value)


class Asked:
    """The three sockets of a daemon, and what each says to a frame."""

    def __init__(self, daemon: LiveDaemon) -> None:
        self.worker = RawWorker(daemon.directory)
        self.peer = RawPeer(daemon.address)
        hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
        self.peer.source = self.peer.say(hello).boot_id
        self.control = self.worker.context.socket(zmq.DEALER)
        self.worker.sockets.append(self.control)
        self.control.setsockopt(zmq.LINGER, 0)
        self.control.connect(f"ipc://{daemon.directory / 'control.sock'}")

    def close(self) -> None:
        self.worker.close()
        self.peer.close()

    def answers(self, hidden: bytes) -> list[Any]:
        """To three messages that each have this hidden in them."""
        beat = worker.CALLS.encode(worker.Heartbeat(call=1))
        ping = peer.MESSAGES.encode(peer.Ping(**self.peer.boots()))
        question = control.REQUESTS.encode(control.GetTransfers())
        self.control.send(hiding(question, hidden))
        assert self.control.poll(10_000)
        return [
            self.worker.raw(hiding(beat, hidden)),
            self.peer.raw(hiding(ping, hidden)),
            control.ANSWERS.decode(self.control.recv()),
        ]


def test_what_msgpack_lets_through_is_no_message(tmp_path: Path) -> None:
    for defence in ("msgpack_as_it_is", None):
        with without(defence)(tmp_path / str(defence)) as daemon:
            asked = Asked(daemon)
            for name, hidden in HIDDEN.items():
                told = asked.answers(hidden)
                if defence is not None:
                    assert [one.kind for one in told] == GOOD, name
                    continue
                assert {one.error.code for one in told} == {"bad_message"}, name
            assert [one.kind for one in asked.answers(b"\x01")] == GOOD
            asked.close()


def test_a_key_that_stands_twice_gives_no_message_two_meanings(tmp_path: Path) -> None:
    """Who looks at frames on the way may go by the first one, and we by the last."""
    shown = worker.CALLS.encode(worker.Send(transfer_id="harmless", call=1))
    for defence, opened in (("msgpack_as_it_is", 1), (None, 0)):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            RawWorker(daemon.directory) as raw,
        ):
            reply = raw.raw(doubled(shown, "transfer_id", "meant"))
            assert (reply.kind == "snapshots") is bool(opened)
            assert len(daemon.transfers("meant")) == opened


@pytest.mark.parametrize("depth", [600, 100_000])
def test_a_frame_that_is_deeper_than_msgpack_bears_ends_nothing(tmp_path: Path, depth: int) -> None:
    with LiveDaemon(tmp_path / "a") as daemon:
        asked = Asked(daemon)
        told = asked.answers(b"\x91" * depth + b"\xc0")
        assert {one.error.code for one in told} == {"bad_message"}
        assert asked.worker.call(worker.Heartbeat()).kind == "snapshots"
        asked.close()
        assert "Traceback" not in daemon.log()
