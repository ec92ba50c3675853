"""docs/getting-started.md, done as it says: a pair, a stalled transfer found, and a drain."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.processes import kvferry
from docs.pages import TOP, blocks, commands

PAGE = TOP / "docs" / "getting-started.md"
WAIT_S = 30


class Guide:
    """The page's commands, in directories of the test's own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: list[subprocess.Popen[str]] = []
        for text in blocks(PAGE, "python"):
            name = text.splitlines()[0].removeprefix("# ")
            (home / name).write_text(self.here(text))

    def here(self, words: str) -> str:
        return words.replace("/dev/shm/kvferry-", str(self.home) + "/")

    def start(self, line: str, *more: str) -> subprocess.Popen[str]:
        """Run a line that goes on."""
        program, *words = [self.here(word) for word in shlex.split(line)]
        module = ["-m", "kvferry_daemon"] if program == "kvferry" else []
        process = subprocess.Popen(
            [sys.executable, *module, *words, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.home,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.running.append(process)
        return process

    def ask(self, line: str) -> str:
        """Run a line to its end; what it says."""
        program, *words = [self.here(word) for word in shlex.split(line)]
        assert program == "kvferry"
        done = kvferry(*words)
        assert done.returncode == 0, done
        return done.stdout

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


@pytest.fixture
def guide(tmp_path: Path) -> Iterator[Guide]:
    one = Guide(tmp_path)
    yield one
    one.close()


def test_as_the_page_says(guide: Guide) -> None:
    """A newcomer's first quarter of an hour, in a few seconds."""
    serve_a, serve_b, prefill, decode, *asks, drain_a, drain_b = commands(PAGE)
    daemons = [guide.start(serve_a), guide.start(serve_b)]
    assert daemons[0].stdout is not None
    assert daemons[1].stdout is not None
    address = json.loads(daemons[0].stdout.readline())["peer_address"]
    daemons[1].stdout.readline()
    source = guide.start(prefill)
    sink = guide.start(decode.replace("tcp://127.0.0.1:PORT", address))
    assert sink.stdin is not None
    assert sink.stdout is not None
    first = "tokens 0 to 8192; Enter: "
    assert sink.stdout.read(len(first)) == first
    status, stalled, at_sink, at_source = [guide.ask(line) for line in asks]
    assert re.search(r"^decode .* 1 +-", status, re.MULTILINE)  # the worker has one transfer
    assert "request-1" in stalled
    assert "the window is full" in at_sink
    assert "request-1" in at_source
    said, _ = sink.communicate("\n\n\n", timeout=WAIT_S)
    assert said.startswith("tokens 8192 to 16384")
    assert (sink.returncode, source.wait(WAIT_S)) == (0, 0)
    assert "drained" in guide.ask(drain_a)
    assert "drained" in guide.ask(drain_b)
    for daemon in daemons:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(WAIT_S) == 0


def test_the_table_has_every_extra_but_those_of_the_project_itself() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    told = re.findall(r"^\| `kvferry\[(\w+)\]` \|", PAGE.read_text(), re.MULTILINE)
    assert set(told) == set(project["optional-dependencies"]) - {"dev", "docs"}
