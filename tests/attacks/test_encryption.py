"""What whoever reads the network sees of a payload, and that nobody talks past the setting."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from attacks.scene import without
from attacks.test_peers import keys_of, move
from kvferry_daemon.keys import trust
from kvferry_daemon.output import Exit
from kvferry_proto import peer
from kvferry_proto.states import Role, State
from live import BOOT_ID, LiveDaemon, RawPeer, RawWorker
from tcp.relay import PAYLOAD_BYTES, Scene
from tcp.test_relay import Once, flip
from wire.test_restart import Pair

TLS = {"payload_encryption": "tls"}
TWO_CHUNKS = """
from kvferry_daemon.command import main
from kvferry_daemon.transports.tcp import tls
tls.RECORDS_MAX = 3
main()
"""


class TiredOfKeys(LiveDaemon):
    """A daemon whose connections may encrypt two small chunks, and no third."""

    program = ("-c", TWO_CHUNKS)


@pytest.mark.parametrize("encryption", ["off", "tls"])
def test_a_payload_is_not_to_be_read_on_the_wire(tmp_path: Path, encryption: str) -> None:
    seen = bytearray()

    def recorded(_place: int, data: bytes) -> Iterator[bytes]:
        seen.extend(data)
        yield data

    with ExitStack() as stack:
        scene = Scene(stack, tmp_path, payload_encryption=encryption)
        stack.callback(scene.consumer.close)
        scene.line.to_sink = recorded
        scene.send()
        scene.check_arrived()
        sample = scene.source.content(0)[:32]
        scene.check_clean()
        security = scene.daemon.status().security
        assert security is not None
        assert (security.payload == "tls") == (encryption == "tls")
    assert len(seen) > PAYLOAD_BYTES  # all of it went by
    assert (sample in seen) == (b"KVF1" in seen) == (encryption == "off")


@pytest.mark.parametrize("encryption", ["off", "tls"])
def test_a_changed_byte_costs_a_connection_without_any_checksum(
    tmp_path: Path, encryption: str
) -> None:
    toml = tmp_path / "daemon.toml"
    toml.write_text("checksum = false")
    with ExitStack() as stack:
        scene = Scene(stack, tmp_path, config=toml, payload_encryption=encryption)
        stack.callback(scene.consumer.close)
        scene.line.to_sink = once = Once(2_000, flip)
        scene.send()
        if encryption == "off":
            end = scene.consumer.wait_end(Role.SINK)
            assert end.state is State.SUCCESS
            with pytest.raises(AssertionError):
                scene.consumer.check(end)  # it has what nobody sent
            return
        scene.check_arrived()
        assert once.done
        assert scene.line.connections == 2
        assert "is no kvferry data port" not in scene.sink.log()  # it was behind the handshake
        assert scene.sink.status().counters["bytes_received"] == PAYLOAD_BYTES
        scene.check_clean()


@pytest.mark.parametrize(("source", "sink"), [("off", "tls"), ("tls", "off")])
def test_daemons_that_are_set_differently_move_nothing(
    tmp_path: Path, source: str, sink: str
) -> None:
    with (
        LiveDaemon(tmp_path / "a", payload_encryption=source) as one,
        LiveDaemon(tmp_path / "b", payload_encryption=sink) as two,
        RawWorker(one.directory) as prefill,
        RawWorker(two.directory) as decode,
    ):
        seen = move(prefill, decode, one.address)
        assert seen.error is not None
        assert seen.error.code == "encryption_differs"
        assert f"the sink has {sink}, the source has {source}" in seen.error.message
        assert "bytes_sent" not in one.status().counters


def test_a_ticket_does_not_come_to_a_sink_that_asks_in_clear(tmp_path: Path) -> None:
    for defence, told in (("encryption_may_differ", "ticket"), (None, "peer_refused")):
        with without(defence)(tmp_path / str(defence), **TLS) as daemon:
            sink = RawPeer(daemon.address)
            hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
            sink.source = sink.say(hello).boot_id
            answer = sink.say(peer.OpenStream(stream=0, connection=0, **sink.boots()))
            assert answer.kind == told
            if defence is None:
                assert answer.error.code == "encryption_differs"
            sink.close()


def test_daemons_with_keys_encrypt_the_payload_too(tmp_path: Path) -> None:
    a, b = tmp_path / "keys a", tmp_path / "keys b"
    key_a, key_b = keys_of(a), keys_of(b)
    trust(a, "b", key_b)
    trust(b, "a", key_a)
    with (
        LiveDaemon(tmp_path / "a", keys_dir=a, **TLS) as source,
        LiveDaemon(tmp_path / "b", keys_dir=b, **TLS) as sink,
        RawWorker(source.directory) as prefill,
        RawWorker(sink.directory) as decode,
    ):
        assert move(prefill, decode, source.address).error is None


def test_a_daemon_that_cannot_make_a_certificate_does_not_start(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None; "
        "from kvferry_daemon.command import main; main()"
    )
    flags = ["--runtime-dir", str(tmp_path / "a"), "--payload-encryption=tls"]
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.USAGE
    assert "pip install 'kvferry[tls]'" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("killed", [("source",), ("sink",)])
def test_a_daemon_in_its_next_life_has_another_certificate_and_goes_on(
    tmp_path: Path, killed: tuple[str, ...]
) -> None:
    pair = Pair(tmp_path, **TLS)
    try:
        got = pair.move(killed, {2})
        np.testing.assert_array_equal(np.concatenate(got), pair.arrays["ids"])
    finally:
        pair.close()


@pytest.mark.parametrize("kind", [LiveDaemon, TiredOfKeys])
def test_a_payload_goes_on_over_another_connection_once_a_key_has_encrypted_enough(
    tmp_path: Path, kind: type[LiveDaemon]
) -> None:
    with (
        kind(tmp_path / "a", **TLS) as source,
        LiveDaemon(tmp_path / "b", **TLS) as sink,
        RawWorker(source.directory) as prefill,
        RawWorker(sink.directory) as decode,
    ):
        for number in range(5):
            assert move(prefill, decode, source.address, f"t{number}").error is None
        closed = sink.status().counters.get("streams_closed", 0)
        assert closed >= 2 if kind is TiredOfKeys else closed == 0
