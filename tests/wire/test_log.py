"""The log of a real daemon: one event a line, each with its transfer, and the same for people."""

import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.processes import kvferry
from faults.processes import until
from kvferry_daemon.logs import LINES_MAX, JsonLines, WriterThread
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import BLOCK, WAIT_S, LiveDaemon, RawWorker

LEVELS = {"debug", "info", "warning", "error", "critical"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
STRANGE = "x\x1b[2J"


def events(daemon: LiveDaemon) -> list[dict[str, Any]]:
    """Every line of its log, each found to have what each must have."""
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    for line in lines:
        assert TIME.fullmatch(line["time"]), line
        assert line["level"] in LEVELS
        assert {type(line[name]) for name in ("logger", "event")} == {str}
    return lines


def moved(one: RawWorker, transfer_id: str) -> None:
    """A transfer within a daemon, to its end."""
    one.snapshot(worker.Send(transfer_id=transfer_id, total_tokens=BLOCK))
    seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == BLOCK, transfer_id)
    one.fill(seen, BLOCK)
    one.snapshot(worker.Ready(transfer_id=transfer_id, ready_tokens=BLOCK))
    one.snapshot(worker.Receive(transfer_id=transfer_id))
    one.wait_end(Role.SINK, transfer_id)
    one.snapshot(worker.Resume(transfer_id=transfer_id, sent_tokens=BLOCK))
    for role in Role:
        one.snapshot(worker.Release(role=role, transfer_id=transfer_id))


def test_every_line_is_an_object_and_names_its_transfer(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", log_level="debug", lost_s=60) as daemon:
        with RawWorker(daemon.directory) as one:
            moved(one, "well")
            one.snapshot(worker.Receive(transfer_id="stuck", attempt=3))
            done = kvferry(
                "abort", "stuck", "--reason", "why\nnot", "--runtime-dir", daemon.directory
            )
            assert done.returncode == 0, done
            one.socket.send_multipart([b"\xc1 no message"])
            one.reply()
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(WAIT_S) == 0
        lines = events(daemon)
    of = {
        (line["event"], line["transfer_id"], line["role"]): line for line in lines if "role" in line
    }
    for role in ("source", "sink"):
        assert of["transfer opened", "well", role]["level"] == "debug"
        end = of["transfer ended well", "well", role]
        assert (end["level"], end["sent_tokens"], end["total_tokens"]) == ("info", BLOCK, BLOCK)
        assert end["took_s"] >= 0
    failed = of["transfer failed", "stuck", "sink"]
    assert (failed["level"], failed["attempt"], failed["error"]) == ("warning", 3, "aborted")
    assert "why not" in failed["why"]
    (said,) = [line for line in lines if line["event"] == "operator"]
    assert (said["transfer_id"], said["user"].split(":")[0]) == ("stuck", str(os.getuid()))
    assert lines[-1]["event"] == "stopped"


def test_a_next_life_tells_what_it_goes_on_with(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", log_level="debug", lost_s=60) as daemon,
        RawWorker(daemon.directory) as one,
    ):
        one.snapshot(worker.Receive(transfer_id="waits"))
        until(lambda: "transfer opened" in daemon.log())
        daemon.process.kill()
        with daemon.again() as next_life:
            until(lambda: "transfer taken up again" in next_life.log())
            lines = events(next_life)
    told = [line for line in lines if line["logger"] == "kvferry_daemon.transfers"]
    said = [line["event"] for line in told if line["transfer_id"] == "waits"]
    assert said == ["transfer opened", "transfer taken up again"]


def test_a_reader_that_stands_still_holds_nothing_up(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kvferry_daemon",
        "serve",
        "--runtime-dir",
        str(tmp_path / "d"),
    ]
    flags = ["--pool-tokens=256", "--window-tokens=64", "--lost-s=60", "--log-level=debug"]
    daemon = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        assert daemon.stdout.readline()
        with RawWorker(tmp_path / "d") as one:
            for number in range(LINES_MAX // 2 + 500):  # two lines each, and 64 KiB fit into a pipe
                name = f"t{number}"
                call = worker.Send(transfer_id=name)
                gone = worker.Abort(role=Role.SOURCE, transfer_id=name)
                done = worker.Release(role=Role.SOURCE, transfer_id=name)
                assert one.call(worker.Batch(calls=[call, gone, done]))
            daemon.send_signal(signal.SIGTERM)
        said, _ = daemon.communicate(timeout=WAIT_S)[::-1]
        assert daemon.returncode == 0
    finally:
        daemon.kill()
        daemon.wait()
    told = [json.loads(line)["event"] for line in said.splitlines()]
    assert any(re.fullmatch(r"\d+ lines were dropped: nobody read them", one) for one in told)


def test_on_a_terminal_people_read_it(tmp_path: Path) -> None:
    said = on_terminal(tmp_path / "a")
    assert not said.startswith("{")
    assert re.search(r"^\d\d:\d\d:\d\d\.\d{3} INFO    daemon: ready: tcp://", said, re.MULTILINE)
    assert re.search(
        r"WARNING transfers: transfer failed transfer_id=gone role=source attempt=0 .*error=aborted",
        said,
    )
    assert "\x1b" not in said, "a reason is nobody's markup"
    assert r"see x\x1b[2J" in said


def test_the_setting_beats_the_terminal(tmp_path: Path) -> None:
    lines = on_terminal(tmp_path / "a", "--log-format=json").splitlines()
    assert "transfer failed" in [json.loads(line)["event"] for line in lines]


def on_terminal(directory: Path, *flags: str) -> str:
    """What a daemon that has a terminal for its log writes in a life with one failed transfer."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "kvferry_daemon", "serve", "--runtime-dir", str(directory)]
    daemon = subprocess.Popen(
        [*command, "--pool-tokens=256", "--window-tokens=64", *flags],
        stdout=subprocess.PIPE,
        stderr=slave,
    )
    os.close(slave)
    assert daemon.stdout is not None
    assert daemon.stdout.readline()
    with RawWorker(directory) as one:
        one.snapshot(worker.Send(transfer_id="gone"))
        reason = f"see {STRANGE}"
        one.snapshot(worker.Abort(role=Role.SOURCE, transfer_id="gone", reason=reason))
    daemon.send_signal(signal.SIGTERM)
    said = b""
    try:
        while piece := os.read(master, 1 << 16):
            said += piece
    except OSError:  # how a terminal says that nobody writes any more
        pass
    os.close(master)
    daemon.stdout.close()
    assert daemon.wait(WAIT_S) == 0
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("raises", [True, False])  # NIXL's import sets it to False
def test_a_line_that_cannot_be_made_is_told_of_and_fails_nobody(
    raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", raises)
    stream = io.StringIO()
    handler = WriterThread(stream, JsonLines())
    for words, args in (("%d of them", ("no number",)), ("next", ())):
        handler.handle(logging.makeLogRecord({"msg": words, "args": args, "pathname": "here.py"}))
    handler.close()
    failed, after = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (failed["level"], after["event"]) == ("error", "next")
    assert "here.py" in failed["event"]
    assert "%d of them" in failed["event"]
