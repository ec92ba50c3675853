"""The control socket of a live daemon: every question is answered, and with its own number."""

import os
import signal
from pathlib import Path

import pytest
import zmq

from kvferry_client import connect
from kvferry_proto import control
from kvferry_proto.errors import Code
from live import LAYOUT, LiveDaemon

CALL = 4711
WAIT_MS = 10_000


def asked(daemon: LiveDaemon, frame: bytes) -> control.Answer:
    """What one frame is answered with."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.connect(f"ipc://{daemon.directory / 'control.sock'}")
        socket.send(frame)
        assert socket.poll(WAIT_MS), "no answer"
        return control.ANSWERS.decode(socket.recv())
    finally:
        context.destroy(linger=0)


def refusal(daemon: LiveDaemon, request: control.Request) -> control.ControlFailure:
    """How a request is refused."""
    answer = asked(daemon, control.REQUESTS.encode(request))
    assert isinstance(answer, control.ControlFailure), answer
    return answer


def test_a_fault_of_ours_is_answered_and_the_daemon_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installation is broken: its metadata names no version, which a status tells."""
    broken = tmp_path / "broken" / "kvferry-0.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Name: kvferry\n")
    paths = [str(broken.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # or a checkout's own metadata comes before
    with LiveDaemon(tmp_path / "a") as daemon:
        failure = refusal(daemon, control.GetStatus(call=CALL))
        assert (failure.call, failure.error.code) == (CALL, Code.INTERNAL)
        assert "get_status: ValidationError" in failure.error.message
        daemon.wait_for_log("Traceback")
        answer = asked(daemon, control.REQUESTS.encode(control.GetTransfers(call=CALL)))
        assert isinstance(answer, control.Transfers)
        assert answer.call == CALL


def test_only_what_cannot_be_read_is_a_bad_message_and_a_refusal_has_the_number_of_its_call(
    tmp_path: Path,
) -> None:
    with LiveDaemon(tmp_path / "a") as daemon, connect(daemon.directory, LAYOUT, "one") as one:
        one.send("keeps-it-up")
        daemon.process.send_signal(signal.SIGTERM)
        while not daemon.status().draining:
            pass
        failure = refusal(daemon, control.AbortTransfer(call=CALL, transfer_id="nobody"))
        assert (failure.call, failure.error.code) == (CALL, Code.UNKNOWN_TRANSFER)
        failure = refusal(daemon, control.SetDraining(call=CALL, draining=False))
        assert (failure.call, failure.error.code) == (CALL, Code.DRAINING)
        assert daemon.status().counters.get("bad_messages_control", 0) == 0
        answer = asked(daemon, b"no message")
        assert isinstance(answer, control.ControlFailure)
        assert (answer.call, answer.error.code) == (0, Code.BAD_MESSAGE)
        assert daemon.status().counters["bad_messages_control"] == 1
