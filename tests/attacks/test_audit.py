"""The audit log: who did what and was refused what; no secret, no payload, no flood of lines."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from cli.processes import kvferry
from kvferry_daemon.audit import LINES_A_S, Audit
from kvferry_daemon.core.deeds import Deed
from kvferry_daemon.logs import FIELDS
from kvferry_proto import worker
from kvferry_proto.states import Role
from live import BLOCK, LAYOUT, LiveDaemon, RawWorker

USER = f"{os.getuid()}:{os.getgid()}:{os.getpid()}"
WAIT_S = 10.0


def audited(daemon: LiveDaemon) -> list[str]:
    """The lines so far: what was done, and who did it, and all else as pairs."""
    told = [json.loads(line) for line in daemon.log().splitlines()]
    return [_line(one) for one in told if one["logger"] == "kvferry.audit"]


def _line(told: dict[str, Any]) -> str:
    of_every_line = ("time", "level", "logger", "event")
    facts = {"what": told["event"]} | {k: v for k, v in told.items() if k not in of_every_line}
    return " ".join(f"{name}={_quoted(str(value))}" for name, value in facts.items())


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w.:/@+-]+", value) else json.dumps(value)


def wait_for(daemon: LiveDaemon, pattern: str) -> str:
    """A line that fits; it may come a moment after what it tells of."""
    until_s = time.monotonic() + WAIT_S
    while True:
        for line in audited(daemon):
            if re.fullmatch(pattern, line):
                return line
        assert time.monotonic() < until_s, audited(daemon)
        time.sleep(0.05)


def test_who_opened_resumed_and_aborted_what(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon, RawWorker(daemon.directory) as one:
        one.snapshot(worker.Send(transfer_id="t", total_tokens=2 * BLOCK))
        one.snapshot(worker.Send(transfer_id="t", total_tokens=2 * BLOCK))  # repeated
        one.snapshot(worker.Receive(transfer_id="t"))
        seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens >= BLOCK)
        one.fill(seen, BLOCK)
        one.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK))
        one.wait_for(Role.SINK, lambda s: s.sent_tokens == BLOCK)
        one.snapshot(worker.Resume(transfer_id="t", sent_tokens=BLOCK))
        one.snapshot(worker.Resume(transfer_id="t", sent_tokens=BLOCK))  # repeated
        one.snapshot(worker.Abort(transfer_id="t", role=Role.SINK, reason="no\nmore what=x"))
        wait_for(daemon, "what=aborted .*")
        named = f"user={USER} role=%s transfer_id=t attempt=0"
        assert audited(daemon) == [
            "what=opened " + named % "source",
            "what=opened " + named % "sink",
            "what=resumed " + named % "sink",
            "what=aborted " + named % "sink" + ' why="no more what=x"',
        ]


def test_who_was_refused_what_and_why(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a") as daemon,
        RawWorker(daemon.directory) as one,
        RawWorker(daemon.directory) as other,
    ):
        one.snapshot(worker.Send(transfer_id="t"))
        assert other.code(worker.Abort(transfer_id="t", role=Role.SOURCE)) == "not_your_transfer"
        line = wait_for(daemon, "what=refused .*")
        assert line == (
            f"what=refused user={USER} asked=abort transfer_id=t attempt=0 code=not_your_transfer "
            "why=\"'t' was opened by another session\""
        )


def test_what_operators_did(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon, RawWorker(daemon.directory) as one:
        for verb in (["drain"], ["undrain"], ["abort", "t", "--reason", "it is stuck"]):
            if "abort" in verb:
                one.snapshot(worker.Send(transfer_id="t"))
            assert kvferry(*verb, "--runtime-dir", daemon.directory).returncode == 0
        by = rf"what=operator user={os.getuid()}:{os.getgid()}:\d+ asked="
        wait_for(daemon, by + "set_draining")
        wait_for(daemon, by + 'set_draining why="no more"')
        wait_for(daemon, by + 'abort_transfer transfer_id=t why="it is stuck"')


def test_the_logs_level_silences_no_deed(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", log_level="warning") as daemon:
        for verb in (["logs", "level", "error"], ["drain"]):
            assert kvferry(*verb, "--runtime-dir", daemon.directory).returncode == 0
        by = rf"what=operator user={os.getuid()}:{os.getgid()}:\d+ asked="
        wait_for(daemon, by + "set_log_level.*")
        wait_for(daemon, by + "set_draining")


def test_no_secret_and_no_payload_is_in_the_log(tmp_path: Path) -> None:
    """Not even where a call is refused that bears one."""
    payload = b"payload-that-nobody-may-see"
    with (
        LiveDaemon(tmp_path / "a", log_level="debug") as daemon,
        RawWorker(daemon.directory) as one,
    ):
        assert one.welcome is not None
        one.snapshot(worker.Send(transfer_id="t", aux=None))
        hello = worker.Hello(lock="f" * 32, layout=LAYOUT, session="ab" * 32)
        assert one.code(hello) == "worker_not_locked"
        known = worker.Hello(lock=one.lock_name, layout=LAYOUT, session="cd" * 32)
        assert one.code(known) == "unknown_session"
        aux: dict[str, int | float | str | bytes] = {"x": payload}
        assert one.call(worker.Send(transfer_id="u", aux=aux)).kind == "failure"
        wait_for(daemon, "what=refused .*unknown_session.*")
        log = daemon.log()
        for secret in (one.welcome.session, "ab" * 32, "cd" * 32, payload.decode()):
            assert secret not in log


def test_a_flood_of_refusals_hides_nothing_else_and_fills_no_disk(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "kvferry.audit")
    audit = Audit()
    for number in range(100_000):
        audit.tell(Deed("refused", "1:2:3", why=f"{number}"))
    audit.tell(Deed("opened", "1:2:3", transfer_id="t"))
    first, last = caplog.records[0], caplog.records[-1]
    assert last.getMessage() == "opened"
    assert last.__dict__[FIELDS] == {"user": "1:2:3", "transfer_id": "t"}
    assert len(caplog.records) < 20 * LINES_A_S
    assert first.__dict__[FIELDS] == {"user": "1:2:3", "why": "0"}
    time.sleep(2 / LINES_A_S)
    audit.tell(Deed("refused", "1:2:3"))
    of_a_kind = [one.__dict__[FIELDS] for one in caplog.records if one.getMessage() == "refused"]
    assert len(of_a_kind) + sum(one.get("left_out", 0) for one in of_a_kind) == 100_001
