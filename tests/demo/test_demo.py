"""`kvferry demo` as a user runs it: real daemons, real workers, a real model."""

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cli.test_documented import documented
from kvferry_proto.states import State
from live import LiveDaemon

pytestmark = pytest.mark.timeout(180)
WINDOW = 8192


def demo(*args: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON object of a run."""
    command = [sys.executable, "-m", "kvferry_daemon", "demo", "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, result


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--payload", "embeddings"],
        ["--handoff"],
        ["--block-reuse"],
        ["--total-late"],
        ["--payload", "embeddings", "--handoff", "--total-late"],
    ],
    ids=" ".join,
)
def test_tokens_and_bytes_are_the_same_over_two_resumes(args: list[str]) -> None:
    code, result = demo(*args)
    assert code == 0
    assert set(result) == documented()[result["schema"]]
    assert result["tokens_equal"]
    assert result["bytes_equal"]
    assert result["tokens"] == 20480
    assert result["sent_tokens_at_resume"] == [WINDOW, 2 * WINDOW]
    assert (result["windows"], result["resumes"]) == (3, 2)
    assert result["bytes_moved"] > 0


@pytest.mark.parametrize(
    ("tokens", "late", "resumes"),
    [
        (1, False, [[]]),
        (WINDOW, False, [[]]),
        (WINDOW, True, [[], [WINDOW]]),  # the total may come before or after the window is full
        (WINDOW + 1, False, [[WINDOW]]),
        (WINDOW + 1, True, [[WINDOW]]),
    ],
)
def test_the_edges_of_a_window(tokens: int, late: bool, resumes: list[list[int]]) -> None:
    code, result = demo("--tokens", str(tokens), *(["--total-late"] if late else []))
    assert code == 0
    assert result["tokens"] == tokens
    assert result["sent_tokens_at_resume"] in resumes


@pytest.mark.parametrize("harm", ["swap-windows", "zero-token"])
def test_damage_on_the_way_fails_the_demo(harm: str) -> None:
    code, result = demo("--tokens", "17000", "--harm", harm)
    assert code == 1
    assert not result["bytes_equal"]


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_worker_leaves_no_block_behind(tmp_path: Path, victim: str) -> None:
    flags = {"window_tokens": WINDOW, "heartbeat_s": 0.2, "lost_s": 60}
    with ExitStack() as stack:
        a = stack.enter_context(
            LiveDaemon(tmp_path / "a", source_share=1.0, pool_tokens=WINDOW, **flags)
        )
        b = stack.enter_context(
            LiveDaemon(tmp_path / "b", source_share=0.0, pool_tokens=WINDOW, **flags)
        )
        common = ["--tokens", "20480", "--transfer-id", "t"]
        prefill = start(stack, "prefill", [*common, "--runtime-dir", str(a.directory)])
        decode = start(
            stack, "decode", [*common, "--runtime-dir", str(b.directory), "--source", a.address]
        )
        stop_in_the_middle(prefill, b)
        (prefill if victim == "prefill" else decode).kill()
        prefill.send_signal(signal.SIGCONT)
        survivor = decode if victim == "prefill" else prefill
        assert survivor.wait(60) != 0
        for daemon in (a, b):
            status = daemon.wait_until_free(30)
            assert status.blocks_total > 0
            (row,) = daemon.transfers("t")
            assert row.snapshot.state is State.FAILED


def stop_in_the_middle(prefill: subprocess.Popen[str], sink: LiveDaemon) -> None:
    """Stop prefill while most of the prompt is to come, and wait until some of it has moved."""
    assert prefill.stdout is not None
    for line in prefill.stdout:
        if json.loads(line).get("ready_tokens", 0) >= 4096:
            break
    prefill.send_signal(signal.SIGSTOP)
    sink.wait_for_transfer("t", lambda row: row.snapshot.sent_tokens > 0, wait_s=60)


def start(stack: ExitStack, module: str, args: list[str]) -> subprocess.Popen[str]:
    """A worker of the demo."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"kvferry_client.demo.{module}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def end() -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    stack.callback(end)
    return process
