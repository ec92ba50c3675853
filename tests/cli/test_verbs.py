"""The verbs that explain and change, against live daemons: filters, stories, drain, abort."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from cli.processes import kvferry
from kvferry_client import connect
from kvferry_daemon.output import Exit
from kvferry_daemon.verbs import LOOK_S
from kvferry_proto import control, worker
from kvferry_proto.codec import Codec
from kvferry_proto.control import Status
from kvferry_proto.states import Role
from live import BLOCK, LAYOUT, WINDOW, LiveDaemon, RawWorker

NOT_ROOT = 12345
KVFERRY = (sys.executable, "-m", "kvferry_daemon")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """A daemon of its own for each test: they drain and abort."""
    with LiveDaemon(tmp_path / "a", lost_s=60) as live:  # raw workers do not beat
        yield live
        assert "Traceback" not in live.log()


def said(daemon: LiveDaemon, *args: object) -> Any:
    """The JSON answer of a verb that succeeds."""
    done = kvferry(*args, "--json", "--runtime-dir", daemon.directory)
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def refused(daemon: LiveDaemon, *args: object) -> tuple[int, str]:
    """Exit code and the one line on stderr of a verb that fails."""
    done = kvferry(*args, "--runtime-dir", daemon.directory)
    (line,) = done.stderr.splitlines()
    return done.returncode, line


def ids(answer: Any) -> list[str]:
    return [row["snapshot"]["transfer_id"] for row in answer["transfers"]]


def half_way(one: RawWorker, transfer_id: str) -> None:
    """A transfer within this daemon: 16 of 100 tokens are there, and the source makes no more."""
    one.snapshot(worker.Send(transfer_id=transfer_id))
    one.snapshot(worker.Receive(transfer_id=transfer_id))
    seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW, transfer_id)
    one.fill(seen, BLOCK)
    one.snapshot(worker.Ready(transfer_id=transfer_id, ready_tokens=BLOCK, total_tokens=100))
    one.wait_for(Role.SINK, lambda s: s.sent_tokens == BLOCK, transfer_id)


def test_filters_leave_what_fits_and_sorting_puts_most_at_the_end(daemon: LiveDaemon) -> None:
    lost = "tcp://127.0.0.1:1"
    with RawWorker(daemon.directory) as one, connect(daemon.directory, LAYOUT, "other") as other:
        half_way(one, "moved")
        one.snapshot(worker.Receive(transfer_id="early"))
        other.receive("far", source=lost)
        all_ = said(daemon, "transfers")
        assert all_["schema"] == "kvferry/transfers/1"
        assert sorted(ids(all_)) == ["early", "far", "moved", "moved"]
        assert ids(said(daemon, "transfers", "--stall", "waiting_for_source")) == ["early"]
        assert ids(said(daemon, "transfers", "--state", "transferring", "--role", "sink")) == [
            "moved"
        ]
        assert ids(said(daemon, "transfers", "--worker", "other")) == ["far"]
        assert ids(said(daemon, "transfers", "--peer", lost)) == ["far"]
        assert ids(said(daemon, "transfers", "--age-s", "3600")) == []
        assert (
            ids(said(daemon, "transfers", "--idle-s", "0", "--sort", "sent"))[-2:] == ["moved"] * 2
        )
        assert ids(said(daemon, "transfers", "--sort", "age"))[0] == "far", "the oldest is last"
        few = said(daemon, "transfers", "--sort", "blocks", "--limit", "1")
        assert (ids(few), few["more"]) == (["moved"], 3)


def test_a_stalled_transfer_is_explained(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "slow")
        answer = said(daemon, "explain", "slow")
        source, sink = sorted(
            answer["transfers"], key=lambda e: e["seen"]["snapshot"]["role"] == "sink"
        )
        assert sink["seen"]["snapshot"]["stall"] == "waiting_for_input"
        assert "source's worker" in sink["waits_for"]
        assert sink["helps"]
        assert sink["stalled_s"] >= 0
        assert f"(pid {os.getpid()})" in sink["holding"], "the kernel's: the raw worker tells none"
        told = [moment["what"] for moment in sink["moments"]]
        assert told[0].startswith("opened")
        assert any("the total is known" in what for what in told)
        assert any(f"tokens up to {BLOCK} received" in what for what in told)
        assert [m["sent_tokens"] for m in sink["moments"]][-1] == BLOCK
        agos = [moment["ago_s"] for moment in sink["moments"]]
        assert agos == sorted(agos, reverse=True)
        assert any("marked ready" in m["what"] for m in source["moments"])
        words = kvferry("explain", "slow", "--runtime-dir", daemon.directory).stdout
    assert "slow, sink, attempt 0: Transferring, 16 of 100 tokens" in words
    assert "what usually helps: " in words


def test_one_that_waits_for_blocks_is_told_who_has_them(tmp_path: Path) -> None:
    with (
        LiveDaemon(tmp_path / "a", pool_tokens=2 * WINDOW, lost_s=60) as daemon,
        RawWorker(daemon.directory) as one,
    ):
        one.snapshot(worker.Send(transfer_id="greedy"))
        one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW, "greedy")
        one.snapshot(worker.Send(transfer_id="hungry"))
        one.snapshot(worker.Receive(transfer_id="hungry"))
        daemon.wait_for_transfer("hungry", lambda row: row.snapshot.stall == "waiting_for_blocks")
        answer = said(daemon, "explain", "hungry")
        (waiting,) = [e for e in answer["transfers"] if e["seen"]["snapshot"]["role"] == "source"]
        assert [h["transfer_id"] for h in waiting["holders"]] == ["greedy"]
        assert waiting["holders"][0]["blocks"] == WINDOW // BLOCK


def test_an_ended_transfer_still_has_its_story(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "given-up")
        one.snapshot(worker.Abort(transfer_id="given-up", role=Role.SOURCE, reason="no more"))
        for role in Role:
            one.snapshot(worker.Release(transfer_id="given-up", role=role))
        daemon.wait_until_free()
        (source,) = [
            e
            for e in said(daemon, "explain", "given-up")["transfers"]
            if e["seen"]["snapshot"]["role"] == "source"
        ]
    assert source["seen"]["ended"]
    assert source["seen"]["snapshot"]["error"]["code"] == "aborted"
    assert source["moments"][0]["what"].startswith("opened")
    assert any("state Failed" in moment["what"] for moment in source["moments"])


def test_an_unknown_id_is_told_what_is_near_it(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT, "one") as one:
        for wanted in ("request-4711", "request-4712", "chat-0815"):
            one.send(wanted)
        code, line = refused(daemon, "explain", "request-4713")
        assert code == Exit.UNKNOWN
        assert "request-4711" in line
        assert "request-4712" in line
        assert "chat-0815" not in line
        code, line = refused(daemon, "abort", "reqest-4711")
        assert code == Exit.UNKNOWN
        assert "near it are request-471" in line


def test_both_sides_show_the_other_ones_daemon(tmp_path: Path) -> None:
    """A node that only sends has peers, too."""
    with (
        LiveDaemon(tmp_path / "a", lost_s=60) as source,
        LiveDaemon(tmp_path / "b", lost_s=60) as sink,
        RawWorker(source.directory) as prefill,
        RawWorker(sink.directory) as decode,
    ):
        assert said(source, "status")["sinks"] == []
        prefill.snapshot(worker.Send(transfer_id="t"))
        decode.snapshot(worker.Receive(transfer_id="t", source=source.address))
        seen = prefill.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
        prefill.fill(seen, BLOCK)
        prefill.snapshot(worker.Ready(transfer_id="t", ready_tokens=BLOCK, total_tokens=100))
        decode.wait_for(Role.SINK, lambda s: s.sent_tokens == BLOCK)
        (pulls,) = said(source, "status")["sinks"]
        assert (pulls["address"], pulls["state"]) == (sink.address, "up")
        assert (pulls["streams_open"], pulls["transport"]) == (1, "tcp")
        assert pulls["heard_s"] < 60
        assert "boot_id" not in pulls, "who has it could speak as that daemon"
        (row,) = said(source, "transfers", "--peer", sink.address)["transfers"]
        assert (row["sink"], row["source"]) == (sink.address, None)
        assert ids(said(source, "transfers", "--peer", source.address)) == []
        words = kvferry("status", "--runtime-dir", source.directory).stdout
        (row,) = [line.split() for line in words.splitlines() if line.startswith(sink.address)]
        assert row[1:5] == ["sink", "up", "1", "tcp"]
        words = kvferry("status", "--runtime-dir", sink.directory).stdout
        (row,) = [line.split() for line in words.splitlines() if line.startswith(source.address)]
        assert row[1:5] == ["source", "up", "1", "tcp"]


def test_an_operator_aborts_one_attempt_or_all(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "stuck")
        assert refused(daemon, "abort", "stuck", "--attempt", "3")[0] == Exit.UNKNOWN
        answer = said(daemon, "abort", "stuck", "--reason", "it was\nstuck")
        assert {row["snapshot"]["role"] for row in answer["transfers"]} == {"source", "sink"}
        seen = one.poll(Role.SINK, "stuck")
        assert seen.error is not None
        assert seen.error.code == "aborted"
        assert "by an operator: it was stuck" in seen.error.message
        code, line = refused(daemon, "abort", "stuck")
    assert code == Exit.UNKNOWN
    assert "has ended already" in line
    daemon.wait_for_log("abort_transfer")  # what operators change


def test_drain_waits_names_what_is_stuck_and_can_be_taken_back(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "stuck")
        done = kvferry("drain", "--wait-s", "0", "--runtime-dir", daemon.directory)
        assert done.returncode == Exit.UNDRAINED
        assert "2 transfers are live" in done.stderr
        assert "stuck" in done.stdout
        assert one.code(worker.Send(transfer_id="new")) == "draining"
        assert said(daemon, "undrain")["draining"] is False
        one.snapshot(worker.Send(transfer_id="new"))
        for transfer_id in ("stuck", "new"):
            said(daemon, "abort", transfer_id)
        for role in Role:
            one.snapshot(worker.Release(transfer_id="stuck", role=role))
        one.snapshot(worker.Release(transfer_id="new", role=Role.SOURCE))
        assert said(daemon, "drain")["unsettled"] == 0
        assert daemon.status().draining


def test_a_drain_is_said_once_and_ends_where_somebody_takes_it_back(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "stuck")
        with subprocess.Popen(
            [*KVFERRY, "drain", "--json", "--runtime-dir", str(daemon.directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as drain:
            while not daemon.status().draining:
                pass
            time.sleep(3 * LOOK_S)
            assert daemon.log().count("set_draining") == 1, "a line for each that is said"
            assert said(daemon, "undrain")["draining"] is False
            words, complaint = drain.communicate(timeout=10)
        assert drain.returncode == Exit.UNDRAINED
        assert "takes new transfers again" in complaint
        answer = json.loads(words)
        assert (answer["draining"], answer["unsettled"]) == (False, 2)
        assert not daemon.status().draining


def test_a_drain_names_what_is_left_to_programs_too(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as one:
        half_way(one, "over")
        said(daemon, "abort", "over")
        for role in Role:
            one.snapshot(worker.Release(transfer_id="over", role=role))
        daemon.wait_until_free()
        half_way(one, "stuck")
        done = kvferry("drain", "--wait-s", "0", "--json", "--runtime-dir", daemon.directory)
        assert done.returncode == Exit.UNDRAINED
        left = json.loads(done.stdout)
        assert (left["schema"], left["unsettled"]) == ("kvferry/drain/1", 2)
        assert ids(left) == ["stuck", "stuck"], "what has ended and holds no block is not left"
        done = kvferry("drain", "--wait-s", "0", "--runtime-dir", daemon.directory)
        assert "over" not in done.stdout
        said(daemon, "abort", "stuck")
        for role in Role:
            one.snapshot(worker.Release(transfer_id="stuck", role=role))
        assert said(daemon, "drain")["transfers"] == []


def test_what_was_told_to_end_is_not_brought_back(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT, "one") as one:
        one.send("keeps-it-up")
        daemon.process.send_signal(signal.SIGTERM)
        while not daemon.status().draining:
            pass
        code, line = refused(daemon, "undrain")
    assert code == Exit.REFUSED
    assert "draining" in line


def test_the_log_level_is_changed_while_it_runs(daemon: LiveDaemon) -> None:
    assert said(daemon, "logs", "level")["level"] == "info"
    assert said(daemon, "logs", "level", "debug")["before"] == "info"
    assert daemon.status().log_level == "debug"
    assert kvferry("logs", "level", "loud", "--runtime-dir", daemon.directory).returncode == 2


def test_a_watch_writes_a_line_a_second_until_it_is_interrupted(daemon: LiveDaemon) -> None:
    command = [sys.executable, "-m", "kvferry_daemon", "transfers", "--watch", "--json"]
    with subprocess.Popen(
        [*command, "--runtime-dir", str(daemon.directory)], stdout=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None
        for _ in range(2):
            assert json.loads(watch.stdout.readline())["transfers"] == []
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 0


# --- sockets that are none ---


def test_a_dead_daemons_socket_is_told_from_none(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.close()
    done = kvferry("drain", "--runtime-dir", tmp_path)
    assert done.returncode == Exit.NO_DAEMON
    assert "is gone" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
def test_somebody_elses_socket_is_denied_and_not_absent(daemon: LiveDaemon) -> None:
    code = (
        f"import os, sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path; from kvferry_daemon.operator import ask\n"
        "from kvferry_proto.control import GetStatus; from kvferry_proto.errors import FerryError\n"
        f"os.setuid({NOT_ROOT})\n"
        f"try: ask(Path({str(daemon.directory)!r}), GetStatus())\n"
        "except FerryError as error: print(error.code)"
    )
    daemon.directory.parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "control_denied", done


def test_a_daemon_of_another_version_is_named(tmp_path: Path) -> None:
    """It knows `get_status` alone, and refuses what it does not know as every version does."""
    old: Codec[control.GetStatus] = Codec(control.GetStatus)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path / 'control.sock'}")
    command = [
        sys.executable,
        "-m",
        "kvferry_daemon",
        "explain",
        "x",
        "--runtime-dir",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as asking:
        for _ in range(2):
            route, frame = router.recv_multipart()
            router.send_multipart([route, control.ANSWERS.encode(old_answer(old, frame))])
        assert asking.wait(10) == Exit.VERSION
        assert asking.stderr is not None
        line = asking.stderr.read()
    context.destroy(linger=0)
    assert "no_common_version" in line
    assert "the daemon is kvferry 0.0.9" in line


def old_answer(old: Codec[control.GetStatus], frame: bytes) -> Any:
    from kvferry_proto.errors import FerryError
    from kvferry_proto.fields import ErrorInfo

    try:
        old.decode(frame)
    except FerryError as error:
        return control.ControlFailure(error=ErrorInfo.of(error.code, error.message))
    return Status(
        version="0.0.9", wire_versions=(1, 1), boot_id="a" * 16, pid=1, uptime_s=1.0, draining=False,
        peer_address="", runtime_dir="", workers=0, blocks_total=0, blocks_free=0, transfers={},
        stalls={}, counters={}, pools=[], peers=[],
    )  # fmt: skip


# --- what needs no daemon ---


def test_a_good_config_is_good_and_a_bad_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kvferry.toml"
    file.write_text("window_tokens = 4096\n")
    done = kvferry("config", "check", "--config", file, "--json")
    assert json.loads(done.stdout)["settings"]["window_tokens"] == 4096
    file.write_text("window_token = 4096\n")
    done = kvferry("config", "check", "--config", file)
    assert done.returncode == Exit.USAGE
    assert "window_tokens" in done.stderr


def findings(*args: object) -> tuple[int, dict[str, dict[str, str]]]:
    done = kvferry("doctor", "--json", *args)
    return done.returncode, {one["what"]: one for one in json.loads(done.stdout)["findings"]}


def test_the_doctor_finds_a_machine_well_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    code, found = findings("--runtime-dir", tmp_path / "new")
    assert code == 0
    assert found["runtime directory"]["verdict"] == "well"
    (tmp_path / "mount").mkdir()
    (tmp_path / "mount" / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, found = findings("--runtime-dir", tmp_path / "mount", "--peer-port", port)
    assert code == Exit.DOCTOR
    assert found["runtime directory"]["verdict"] == "fault"
    assert str(tmp_path / "mount" / "kvferry") in found["runtime directory"]["remedy"]
    assert found[f"peer_port {port}"]["verdict"] == "fault"


def test_the_doctor_sees_the_daemon_that_runs(daemon: LiveDaemon) -> None:
    code, found = findings("--runtime-dir", daemon.directory)
    assert code == 0
    assert f"pid {daemon.process.pid}" in found["daemon"]["seen"]
    assert f"held by pid {daemon.process.pid}" in found["runtime directory"]["seen"]
