"""Who gets past the doors of the sockets: what libzmq does by itself, and what a fault makes of it."""

import socket
from pathlib import Path

import pytest

from attacks.scene import without
from attacks.test_peers import a_key, greet, keys_of
from cli.processes import kvferry
from kvferry_daemon.operator import ask
from kvferry_proto import control
from live import LiveDaemon

WAIT_S = 10.0
EXIT_SERVE = 3
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
DEALER = b"\x05"
GREETINGS = {1: b"\x01\x00", 2: SIGNATURE + b"\x01" + DEALER + b"\x00\x00"}


def old_frame(version: int, body: bytes) -> bytes:
    """One message of one frame, as ZMTP 1 and 2 have it."""
    return bytes([len(body) + 1, 0]) + body if version == 1 else bytes([0, len(body)]) + body


def hears(one: socket.socket, word: bytes) -> bool:
    """Whether the word comes before the end."""
    heard = b""
    try:
        while word not in heard:
            part = one.recv(1 << 12)
            if not part:
                return False
            heard += part
    except ConnectionResetError:
        return False
    return True


@pytest.mark.parametrize("version", [1, 2])
def test_a_client_of_an_old_protocol_passes_by_no_door(tmp_path: Path, version: int) -> None:
    """ZMTP 1 and 2 know no mechanisms: whoever speaks them could not be asked who he is."""
    question = control.REQUESTS.encode(control.GetTransfers())
    for defence in ("no_doors", None):
        with (
            without(defence)(tmp_path / str(defence)) as daemon,
            socket.socket(socket.AF_UNIX) as one,
        ):
            one.settimeout(WAIT_S)
            one.connect(str(daemon.directory / "control.sock"))
            one.sendall(GREETINGS[version] + old_frame(version, question))
            assert hears(one, b"transfers") is (defence is not None)


def test_where_nobody_is_at_the_doors_nobody_comes_in(tmp_path: Path) -> None:
    """CURVE alone lets everybody in who has a key, whatever key."""
    _, strangers = a_key()
    cases = (("bare_curve", "peer_welcome"), ("nobody_at_the_doors", "nothing"))
    for defence, told in cases:
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys)
        with without(defence)(tmp_path / defence, keys_dir=keys) as daemon:
            assert greet(daemon, strangers) == told


def test_a_fault_at_a_door_keeps_nobody_out_who_comes_later(tmp_path: Path) -> None:
    """One exception ends pyzmq's own handler, and every later handshake hangs."""
    friend, secret = a_key()
    cases = {
        "handler_is_pyzmqs": ("peer_welcome", "peer_welcome"),  # so it is the fault that ends it
        "faulty_pyzmqs_handler": ("nothing", "nothing"),
        "doors_fail_once": ("nothing", "peer_welcome"),
    }
    for defence, told in cases.items():
        keys = tmp_path / f"keys of {defence}"
        keys_of(keys, friend=friend)
        with without(defence)(tmp_path / defence, keys_dir=keys) as daemon:
            assert (greet(daemon, secret), greet(daemon, secret)) == told


def answers_with(daemon: LiveDaemon) -> int:
    """The process that answers operators in the daemon's directory."""
    answer = ask(daemon.directory, control.GetStatus())
    assert isinstance(answer, control.Status)
    return answer.pid


def test_a_second_daemon_steals_no_sockets(tmp_path: Path) -> None:
    """libzmq binds over a live socket without a word."""
    with LiveDaemon(tmp_path / "a") as first:
        refused = kvferry("serve", "--runtime-dir", first.directory)
        assert refused.returncode == EXIT_SERVE
        assert f"is held by the daemon with pid {first.process.pid}" in refused.stderr
        assert answers_with(first) == first.process.pid
        with without("no_flock")(first.directory) as second:
            assert answers_with(first) == second.process.pid


@pytest.mark.parametrize("name", ["worker.sock", "control.sock"])
def test_nothing_is_replaced_by_a_socket(tmp_path: Path, name: str) -> None:
    for defence in ("files_are_replaced", None):
        directory = tmp_path / str(defence)
        LiveDaemon(directory).stop()
        (directory / name).unlink()
        (directory / name).write_text("dear")
        if defence is None:
            assert "is not a socket" in kvferry("serve", "--runtime-dir", directory).stderr
            assert (directory / name).read_text() == "dear"
            continue
        with without(defence)(directory):
            assert (directory / name).is_socket()
