"""`kvferry status` and `kvferry transfers` against a live daemon: what people and programs see."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.processes import kvferry
from kvferry_client import Client, connect
from kvferry_proto.control import Status, Transfers
from kvferry_proto.states import Role
from live import BLOCK, LAYOUT, WAIT_S, WINDOW, LiveDaemon, RawWorker

LOST = "tcp://127.0.0.1:1"
EXIT_USAGE, EXIT_SERVE, EXIT_NO_DAEMON, EXIT_UNKNOWN, EXIT_OUTPUT = 2, 3, 4, 5, 6
HARD_IDS = ["job[/x]", "req[red]7", ":smile:", "[link=http://x]y[/link]", "-x", "\\[b]"]
LONG_ID = "0f8fad5b-d9cb-469f-a165-70867728950e-cmpl-42-" + "x" * 80


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveDaemon]:
    """One daemon for all tests here; none of them harms it."""
    with LiveDaemon(tmp_path_factory.mktemp("cli") / "a") as live:
        yield live
        assert "Traceback" not in live.log()


@pytest.fixture
def client(daemon: LiveDaemon) -> Iterator[Client]:
    """A worker of it."""
    with connect(daemon.directory, LAYOUT, "tester") as one:
        yield one


def ask(daemon: LiveDaemon, verb: str, *args: object) -> str:
    """The answer on stdout of a question that succeeds."""
    done = kvferry(verb, "--runtime-dir", daemon.directory, *args)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def table(daemon: LiveDaemon, *args: object) -> dict[str, dict[str, str]]:
    """The rows of the transfers' table, by id: a program may split them at spaces."""
    head, *rows = ask(daemon, "transfers", *args).splitlines()
    names = head.replace("waits for", "waits").split()
    found = [row.split(maxsplit=len(names) - 1) for row in rows if "(fault: " not in row]
    return {row[0]: dict(zip(names, row, strict=True)) for row in found}


def test_the_table_lists_transfers_with_state_numbers_and_reason(daemon: LiveDaemon) -> None:
    with RawWorker(daemon.directory) as worker:
        from kvferry_proto import worker as w

        worker.snapshot(w.Send(transfer_id="half-way"))
        worker.snapshot(w.Receive(transfer_id="half-way"))
        snapshot = worker.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW, "half-way")
        worker.fill(snapshot, BLOCK)
        worker.snapshot(w.Ready(transfer_id="half-way", ready_tokens=BLOCK, total_tokens=100))
        worker.wait_for(Role.SINK, lambda s: s.sent_tokens == BLOCK, "half-way")
        worker.snapshot(w.Receive(transfer_id="early", attempt=3))
        rows = ask(daemon, "transfers", "half-way").splitlines()[1:]
        sink = next(row.split() for row in rows if " sink " in row)
        assert len(rows) == 2, "both sides are here"
        early = table(daemon)["early"]
    assert sink[:8] == [
        *("half-way", "sink", "0", "Transferring", "waiting_for_input", "16", "100"),
        "0+16",
    ]
    assert early["try"] == "3"
    assert early["state"] == "Bootstrapping"
    assert (early["waits"], early["sent"], early["total"]) == ("waiting_for_source", "0", "?")


def test_the_table_shows_what_it_filters_and_sorts_by(daemon: LiveDaemon, client: Client) -> None:
    client.receive("shown", source=LOST)
    client.send("held")
    rows = table(daemon)
    assert rows["shown"]["worker"] == "tester"
    assert list(table(daemon, "--peer", LOST)) == ["shown"]
    assert float(rows["shown"]["age"].removesuffix("s")) < 60
    assert (rows["shown"]["blocks"], rows["shown"]["peer"]) == ("0", LOST)
    assert (rows["held"]["blocks"], rows["held"]["peer"]) == ("4", "-")


def test_the_table_fits_a_terminal_and_says_what_it_leaves_out(
    daemon: LiveDaemon, client: Client
) -> None:
    client.receive("wide-0f8fad5b-d9cb", source="tcp://10.11.12.13:54321")
    shown = on_terminal(daemon, "transfers", "--worker", "tester", columns=120)
    head = shown.splitlines()[1].replace("┃", " ").split()
    assert {"transfer", "state", "blocks", "age", "idle", "peer", "worker"} <= set(head)
    (row,) = [line for line in shown.splitlines() if "wide-0f8fad5b-d9cb" in line]
    assert " 10.11.12.13:54321 " in row
    assert "tester" in row
    assert "window" not in head
    assert "no room for try, total, window" in shown
    wide = on_terminal(daemon, "transfers", "--worker", "tester", columns=300)
    assert "window" in wide
    assert "no room" not in wide


def test_an_id_that_is_not_there_is_told_with_those_near_it(
    daemon: LiveDaemon, client: Client
) -> None:
    client.send("request-4711")
    done = kvferry("transfers", "--runtime-dir", daemon.directory, "request-4712")
    assert done.returncode == EXIT_UNKNOWN
    assert "near it are request-4711" in done.stderr


def test_status_tells_of_pools_peers_and_transfers(daemon: LiveDaemon, client: Client) -> None:
    daemon.wait_for_workers(1)  # those of the tests before are dead, and seen to be
    client.send("status-1")
    client.receive("status-2", source="tcp://[fe80::1]:5000")
    out = ask(daemon, "status")
    assert f"pid {daemon.process.pid}" in out
    assert f"peers connect to {daemon.address}; 1 workers" in out
    assert "2 waiting_for_peer" in out
    assert re.search(r"^event loop: \d+ of \d+ looks over 10 ms late, at most ", out, re.MULTILINE)
    turns = r"^loop turns: (\d+) of \d+ over 1 ms, at most [\d.]+ ms; own work: (\d+) over 1 ms, at most "
    assert re.search(turns, out, re.MULTILINE)
    assert "tcp://[fe80::1]:5000" in out, "an IPv6 address is no markup"
    pool = next(line for line in out.splitlines() if line.startswith("host "))
    assert pool.split()[:9] == ["host", "2", "planes", "16", "tokens,", "640", "B", "16", "12"]


def test_status_tells_how_much_moves(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a", lost_s=60) as live, RawWorker(live.directory) as one:
        from kvferry_proto import worker as w

        until = time.monotonic() + WAIT_S
        while live.status().rates is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        one.snapshot(w.Send(transfer_id="t"))
        one.snapshot(w.Receive(transfer_id="t"))
        seen = one.wait_for(Role.SOURCE, lambda s: s.allocated_tokens == WINDOW)
        one.fill(seen, WINDOW)
        one.snapshot(w.Ready(transfer_id="t", ready_tokens=WINDOW, total_tokens=2 * WINDOW))
        one.wait_for(Role.SINK, lambda s: s.sent_tokens == WINDOW)
        rates = live.status().rates
        assert rates is not None
        assert round(rates.tokens_received * rates.seconds) == WINDOW, "of one that is live, too"
        words = ask(live, "status")
        boot_id = live.status().boot_id
    assert re.search(r"^in the last \d+ s: \d+ tokens/s sent, \d+ received; ", words, re.MULTILINE)
    assert f"boot {boot_id}" in words


@pytest.mark.parametrize("transfer_id", HARD_IDS)
def test_an_id_is_shown_as_it_is(daemon: LiveDaemon, client: Client, transfer_id: str) -> None:
    client.send(transfer_id)
    assert transfer_id in table(daemon)
    assert list(table(daemon, "--", transfer_id)) == [transfer_id]


def test_a_long_id_is_whole_when_piped(daemon: LiveDaemon, client: Client) -> None:
    client.send(LONG_ID)
    assert LONG_ID in table(daemon)


def test_a_long_id_is_whole_on_a_narrow_terminal(daemon: LiveDaemon, client: Client) -> None:
    transfer_id = LONG_ID + "-2"
    client.send(transfer_id)
    shown = on_terminal(daemon, "transfers", transfer_id, columns=72)
    assert "…" not in shown
    column = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "".join(column) == transfer_id


def on_terminal(daemon: LiveDaemon, *args: str, columns: int) -> str:
    """What a terminal of this width gets."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "kvferry_daemon", *args, "--runtime-dir"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [*command, str(daemon.directory)],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        env={**environment, "TERM": "dumb"},
    )
    os.close(slave)
    said = b""
    try:
        while piece := os.read(master, 1 << 16):
            said += piece
    except OSError:  # how a terminal says that nobody writes any more
        pass
    os.close(master)
    assert process.wait(10) == 0
    return said.decode()


def test_reasons_of_strangers_are_words_and_nothing_else(
    daemon: LiveDaemon, client: Client
) -> None:
    client.send("gone").abort("see [/docs] \x1b[2J and\u202e be [red]quick[/red]")
    out = ask(daemon, "transfers", "gone")
    assert r"see [/docs] \x1b[2J and\u202e be [red]quick[/red]" in out
    assert table(daemon, "gone")["gone"]["waits"] == "aborted"


def test_json_is_the_whole_answer(daemon: LiveDaemon, client: Client) -> None:
    client.send("json-1")
    status = Status.model_validate_json(ask(daemon, "status", "--json"))
    assert status.pid == daemon.process.pid
    rows = Transfers.model_validate_json(ask(daemon, "transfers", "--json")).transfers
    assert "json-1" in [row.snapshot.transfer_id for row in rows]
    (row,) = json.loads(ask(daemon, "transfers", "--json", "json-1"))["transfers"]
    assert (row["snapshot"]["state"], row["worker"]) == (1, "tester")


@pytest.mark.parametrize("as_json", [False, True])
def test_an_unknown_id_has_words_and_an_exit_code_of_its_own(
    daemon: LiveDaemon, as_json: bool
) -> None:
    flags = ["--json"] if as_json else []
    done = kvferry("transfers", "--runtime-dir", daemon.directory, "nobody[x]", *flags)
    assert done.returncode == EXIT_UNKNOWN
    assert "no transfer nobody[x]" in done.stderr
    assert (json.loads(done.stdout)["transfers"] == []) if as_json else (done.stdout == "")


@pytest.mark.parametrize("wrong", ["a b", "", "ü", "x" * 129, "a\n"])
def test_what_cannot_be_an_id_is_wrong_usage(daemon: LiveDaemon, wrong: str) -> None:
    done = kvferry("transfers", "--runtime-dir", daemon.directory, "--", wrong)
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    (line,) = done.stderr.splitlines()
    assert "is no transfer id" in line


@pytest.mark.parametrize("question", [["status"], ["transfers"], ["status", "--json"]])
def test_output_that_cannot_be_written_is_no_traceback(
    daemon: LiveDaemon, question: list[str]
) -> None:
    assert unwritten(daemon, question, os.open("/dev/full", os.O_WRONLY)) == [
        "kvferry: cannot write the answer: No space left on device"
    ]
    reader, writer = os.pipe()
    os.close(reader)
    assert unwritten(daemon, question, writer) == [], "who reads no further knows it"


def unwritten(daemon: LiveDaemon, question: list[str], stdout: int) -> list[str]:
    """The lines on stderr of a question whose answer goes where it cannot."""
    command = [sys.executable, "-m", "kvferry_daemon", *question, "--runtime-dir"]
    done = subprocess.run(
        [*command, str(daemon.directory)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(stdout)
    assert done.returncode == EXIT_OUTPUT, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("verb", ["status", "transfers"])
def test_no_daemon_is_one_line(tmp_path: Path, verb: str) -> None:
    deep = tmp_path / ("x" * 120)
    for directory in (tmp_path, tmp_path / "nosuch", deep):
        done = kvferry(verb, "--runtime-dir", directory)
        assert (done.returncode, done.stdout) == (EXIT_NO_DAEMON, "")
        (line,) = done.stderr.splitlines()
        assert "daemon_unreachable" in line
        assert str(directory) in line


def test_a_second_daemon_in_a_directory_is_refused_and_the_first_goes_on(
    daemon: LiveDaemon, client: Client
) -> None:
    done = kvferry("serve", "--runtime-dir", daemon.directory)
    assert (done.returncode, done.stdout) == (EXIT_SERVE, "")
    (line,) = done.stderr.splitlines()
    assert f"held by the daemon with pid {daemon.process.pid}" in line
    client.send("t").abort()
    assert kvferry("status", "--runtime-dir", daemon.directory).returncode == 0


def test_a_stopped_daemon_is_told_within_seconds(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as frozen:
        frozen.process.send_signal(signal.SIGSTOP)
        done = kvferry("status", "--runtime-dir", frozen.directory)
        assert done.returncode == EXIT_NO_DAEMON
        assert "no daemon answers" in done.stderr


def test_the_runtime_directory_may_come_from_the_environment(daemon: LiveDaemon) -> None:
    done = kvferry("status", env={"KVFERRY_RUNTIME_DIR": str(daemon.directory)})
    assert done.returncode == 0
    assert daemon.address in done.stdout


def test_version_speaks_to_people_and_programs() -> None:
    assert kvferry("version").stdout.startswith("kvferry ")
    facts = json.loads(kvferry("version", "--json").stdout)
    assert set(facts) == {"schema", "version", "commit", "wire", "capabilities"}
    assert facts["capabilities"]["tcp"] is True
    extras = {"nixl", "http", "paged_kernel", "cuda", "tls", "otel", "top"}
    assert extras <= set(facts["capabilities"])


@pytest.mark.parametrize(
    ("built", "can"),
    [
        ("cuda: str | None = None", False),
        ("cuda = '12.8'", True),
        ("", False),
        ("cuda = what(", False),
    ],
)
def test_cuda_is_what_torch_was_built_for(tmp_path: Path, built: str, can: bool) -> None:
    """It is not loaded for that: it takes seconds, and a version is asked for in passing."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('it is loaded')")
    (tmp_path / "torch" / "version.py").write_text(f"from typing import Optional\n{built}\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = kvferry("version", "--json", env={"PYTHONPATH": os.pathsep.join(paths)})
    assert json.loads(done.stdout)["capabilities"]["cuda"] is can
    assert ("cuda" in kvferry("version", env={"PYTHONPATH": os.pathsep.join(paths)}).stdout) is can
