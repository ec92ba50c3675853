"""The audit log: who did what and was refused what; no secret, no payload, no flood of lines."""

import asyncio
import json
import os
import re
import select
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attacks.scene import without
from cli.processes import kvferry
from kvferry_daemon.audit import LINES_A_S, Audit
from kvferry_daemon.config import Config
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.deeds import WHY_MAX, Deed, Deeds
from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.peer_effects import Connect
from kvferry_daemon.effects import Effects
from kvferry_daemon.life import settings_of
from kvferry_daemon.logs import FIELDS, LINES_MAX
from kvferry_daemon.operator import ask
from kvferry_proto import control, worker
from kvferry_proto.states import Role, State
from live import BLOCK, LAYOUT, LiveDaemon, RawWorker

USER = f"{os.getuid()}:{os.getgid()}:{os.getpid()}"
WAIT_S = 10.0
QUIET_S = 1.0  # longer than a heartbeat, at which what was left out is told
FLOODED = 2 * LINES_MAX
SECRET = b"a secret, or payload: 32 bytes ."
DROPPED = r"\d+ (audit )?lines were dropped: nobody read them"


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
    with LiveDaemon(tmp_path / "a", lost_s=60) as daemon, RawWorker(daemon.directory) as one:
        for verb in (["drain"], ["undrain"], ["abort", "t", "--reason", "it is stuck"]):
            if "abort" in verb:
                one.snapshot(worker.Send(transfer_id="t"))
            assert kvferry(*verb, "--runtime-dir", daemon.directory).returncode == 0
        by = rf"what=operator user={os.getuid()}:{os.getgid()}:\d+ asked="
        wait_for(daemon, by + "set_draining")
        wait_for(daemon, by + 'set_draining why="no more"')
        wait_for(daemon, by + 'abort_transfer transfer_id=t why="it is stuck"')


def test_the_logs_level_silences_no_deed(tmp_path: Path) -> None:
    for defence in ("level_silences_audit", None):
        with without(defence)(tmp_path / str(defence), log_level="warning") as daemon:
            for verb in (["logs", "level", "error"], ["drain"]):
                assert kvferry(*verb, "--runtime-dir", daemon.directory).returncode == 0
            if defence is not None:
                daemon.process.terminate()
                daemon.process.wait()  # what it has to say it has said
                assert audited(daemon) == []
                continue
            by = rf"what=operator user={os.getuid()}:{os.getgid()}:\d+ asked="
            wait_for(daemon, by + "set_log_level.*")
            wait_for(daemon, by + "set_draining")


def test_no_secret_and_no_payload_is_in_the_log(tmp_path: Path) -> None:
    """Not even where a call is refused that bears one."""
    payload = b"payload-that-nobody-may-see"
    for defence in ("refusals_tell_the_call", None):
        with (
            without(defence)(tmp_path / str(defence), log_level="debug") as daemon,
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
            wait_for(daemon, "what=refused .*asked=send .*")
            log = daemon.log()
            secrets = (one.welcome.session, "ab" * 32, "cd" * 32, payload.decode())
            found = [secret for secret in secrets if secret in log]
            assert found == (list(secrets[1:]) if defence else [])


def test_no_aux_value_is_in_a_refusal(tmp_path: Path) -> None:
    """They are payload: only their names are said where they are not what they were."""
    before, now = b"payload-that-was-told", b"payload-that-is-told"
    layout = LAYOUT.model_copy(update={"aux": ("first", "second")})
    for defence in ("differences_are_shown", None):
        with (
            without(defence)(tmp_path / str(defence), log_level="debug") as daemon,
            RawWorker(daemon.directory, layout) as one,
        ):
            one.snapshot(worker.Send(transfer_id="t", aux={"first": before, "second": 2}))
            aux: dict[str, int | float | str | bytes] = {"first": now, "second": 2}
            again = one.call(worker.Send(transfer_id="t", aux=aux))
            ready = one.call(worker.Ready(transfer_id="t", ready_tokens=0, aux=aux))
            assert (again.error.code, ready.error.code) == ("parameters_differ", "aux_changed")
            wait_for(daemon, "what=refused .*asked=ready .*")
            said = daemon.log() + again.error.message + ready.error.message
            found = [value for value in (before, now) if value.decode() in said]
            assert found == ([before, now] if defence else [])
            if defence is None:
                assert again.error.message == ready.error.message
                assert again.error.message == "aux is not what it was before: first"


class NoWayOut:
    """The links' side of a daemon whose sockets all fail."""

    def __getattr__(self, _name: str) -> Any:
        def fail(*_args: object) -> None:
            raise OSError("no way out")

        return fail


def test_what_fails_is_named_and_its_secrets_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        config = Config(runtime_dir=tmp_path, pool_tokens=1024, window_tokens=64)
        node = Node(settings_of(config, "", "d" * 32, 1), lambda: os.urandom(32), 1, 0.0)
        effects = Effects(node, NoWayOut(), tmp_path)
        key = StreamKey("tcp://there:1", 2, 3)
        aux: dict[str, int | float | str | bytes] = {"first": SECRET}
        seen = worker.Snapshot(
            role=Role.SINK, transfer_id="t", attempt=0, snapshot=1, state=State.SUCCESS, aux=aux
        )
        for effect in (
            out.ToWorker(b"route", worker.Snapshots(transfers=[seen])),
            out.Admit(key, SECRET),
            Connect(key, 1, SECRET),
        ):
            effects._perform(effect)
        effects.close()
        assert node.counters["effects_failed"] == 3

    asyncio.run(run())
    assert SECRET.decode() not in caplog.text
    told = [one.getMessage() for one in caplog.records if one.exc_info]
    assert told == [
        "could not do ToWorker",
        "could not do Admit, stream 2.3",
        "could not do Connect, stream 2.3",
    ]


def test_a_deed_has_so_many_words_and_no_more() -> None:
    deeds = Deeds()
    deeds.append(Deed("refused", "1:2:3", why="x" * 100_000))
    ((deed,), _) = deeds.take()
    assert len(deed.why) == WHY_MAX


def test_no_word_of_a_worker_makes_a_line_of_its_own(tmp_path: Path) -> None:
    forged = "12:00:00.000 INFO    kvferry.audit: operator user=0:0:1 asked=set_draining"
    for defence in ("words_are_lines", None):
        with (
            without(defence)(tmp_path / str(defence), log_format="human") as daemon,
            RawWorker(daemon.directory, hello=False) as one,
        ):
            name = f"x\n{forged}\n"
            call = worker.Hello(lock=one.lock_name, layout=LAYOUT, worker=name)
            assert one.call(call).kind == "welcome"
            one.snapshot(worker.Send(transfer_id="t"))
            daemon.wait_for_log("opened user=")
            assert (forged in daemon.log().splitlines()) is (defence is not None)


@pytest.mark.parametrize("flood", ["of other lines", "of refusals"])
def test_where_nobody_reads_the_log_a_flood_takes_no_deeds_place(
    tmp_path: Path, flood: str
) -> None:
    switched_off = "audit_shares_the_log" if flood == "of other lines" else "audit_tells_all"
    for defence in (switched_off, None):
        path = tmp_path / f"{defence}.log"
        os.mkfifo(path)
        pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # nobody reads it yet
        try:
            with (
                without(defence)(tmp_path / str(defence), log_level="debug", lost_s=60) as daemon,
                RawWorker(daemon.directory) as one,
            ):
                fill(pipe)
                for number in range(FLOODED // 256):
                    one.call(worker.Batch(calls=calls(flood, number)))
                ask(daemon.directory, control.SetDraining(draining=True))
                log = read_all(pipe)
                told = [json.loads(line)["event"] for line in log.splitlines()]
                assert ("operator" in told) is (defence is None)
                is_told = any(re.fullmatch(DROPPED, one) for one in told)
                assert is_told is (flood == "of other lines" or defence is not None)
                counters = daemon.status().counters
                assert (counters["audit_dropped"] > 0) is (flood == "of refusals" and bool(defence))
                if flood == "of refusals" and defence is None:
                    deeds = [json.loads(line) for line in log.splitlines()]
                    refused = [one for one in deeds if one["event"] == "refused"]
                    left_out = sum(one.get("left_out", 0) for one in deeds)
                    assert len(refused) + left_out == FLOODED
                    assert counters["audit_left_out"] == left_out
        finally:
            os.close(pipe)


def calls(flood: str, number: int) -> list[worker.Verb]:
    """256 calls that make the daemon write."""
    names = [f"{number}.{one}" for one in range(256)]
    if flood == "of refusals":
        return [worker.Abort(role=Role.SOURCE, transfer_id=name) for name in names]
    made: list[worker.Verb] = []
    for name in names[:128]:  # two lines each
        made.append(worker.Send(transfer_id=name))
        made.append(worker.Abort(role=Role.SOURCE, transfer_id=name))
    return made


def fill(pipe: int) -> None:
    """To the last page: what the daemon's thread had not come to write yet would make room later."""
    line = json.dumps({"event": "filled"}).ljust(select.PIPE_BUF - 1) + "\n"
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, line.encode())


def read_all(pipe: int) -> str:
    """What is in it, until nothing comes any more."""
    found = b""
    while select.select([pipe], [], [], QUIET_S)[0]:
        found += os.read(pipe, 1 << 16)
    return found.decode()


def test_what_is_left_out_is_told_though_nothing_of_its_kind_follows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "kvferry.audit")
    audit, deeds = Audit(), Deeds()
    for number in range(100_000):
        deeds.append(Deed("refused", "1:2:3", why=f"{number}"))
    deeds.append(Deed("operator", "1:2:3", asked="set_draining"))
    audit.take(deeds)
    assert caplog.records[-1].getMessage() == "operator"
    refused = len(caplog.records) - 1
    assert len(deeds) == 0
    assert audit.left_out == 100_000 - refused
    until_s = time.monotonic() + WAIT_S
    while len(caplog.records) == refused + 1:  # the next line of its kind is allowed in a while
        assert time.monotonic() < until_s
        audit.settle()
    audit.settle()
    (last,) = caplog.records[refused + 1 :]
    assert last.getMessage() == "left_out"
    assert last.__dict__[FIELDS] == {"of": "refused", "left_out": 100_000 - refused}


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
