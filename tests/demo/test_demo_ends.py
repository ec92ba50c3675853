"""`kvferry demo` where it cannot run, or is told to end: words, and nothing left behind."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvferry_client.demo import llama, multimodal, roles
from kvferry_client.transformers_cache import layout_of
from kvferry_daemon.demo.run import ROLE_TOKENS

pytestmark = pytest.mark.timeout(180)
COMMAND = [sys.executable, "-m", "kvferry_daemon", "demo"]
MARK = "DEMO_TEST_MARK"
DOCKER_SHM_BYTES = 64 << 20
WAIT_S = 60


def demo(*args: str, env: dict[str, str] | None = None, before: tuple[str, ...] = ()) -> Any:
    """A run to its end."""
    return subprocess.run(
        [*before, *COMMAND, *args],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def with_signals(handler: str) -> list[str]:
    """The demo, started with SIGHUP and SIGINT handled so, however these tests were started."""
    code = (
        "import os, signal, sys; "
        f"signal.signal(signal.SIGHUP, signal.{handler}); "
        f"signal.signal(signal.SIGINT, signal.{handler}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return [sys.executable, "-c", code, *COMMAND[1:]]


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes that were started with this mark."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_demo_that_is_ended_leaves_no_process_and_no_directory(number: signal.Signals) -> None:
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        with_signals("SIG_DFL"),
        env={**os.environ, MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        check_its_end(process, mark, number)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def check_its_end(process: subprocess.Popen[str], mark: str, number: signal.Signals) -> None:
    """Wait until all of it runs, end it, and wait until nothing is left."""
    until = time.monotonic() + WAIT_S
    while not any("reference" in line for line in marked(mark).values()):  # started last
        assert process.poll() is None
        assert time.monotonic() < until, marked(mark)
        time.sleep(0.02)
    lines = [line for line in marked(mark).values() if "--runtime-dir" in line]
    directory = Path(lines[0].partition("--runtime-dir ")[2].split()[0]).parent
    assert len(marked(mark)) == 7, "the demo, two daemons, three workers, the directory's keeper"
    assert directory.is_dir()
    process.send_signal(number)
    _, said = process.communicate(timeout=WAIT_S)
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
    assert process.returncode == codes.get(number, 1)
    assert "Traceback" not in said
    until = time.monotonic() + WAIT_S
    while marked(mark) or directory.exists():
        assert time.monotonic() < until, (marked(mark), list(directory.rglob("*")))
        time.sleep(0.02)


def test_what_nohup_ignores_stays_ignored() -> None:
    process = subprocess.Popen(
        [*with_signals("SIG_IGN"), "--tokens", "1"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "source daemon" in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_both_pools_of_every_mode_fit_well_into_the_shm_of_a_container() -> None:
    kv = layout_of(llama.build_model(1).config, block_size_tokens=roles.BLOCK_TOKENS)
    embeddings = roles.layout_of(multimodal.planes(multimodal.build_model(1)), ())
    for layout in (kv, embeddings):
        blocks = 2 * ROLE_TOKENS // layout.block_size_tokens
        assert blocks * layout.block_bytes < DOCKER_SHM_BYTES * 2 // 3


def with_shm(mib: int) -> tuple[str, ...]:
    """A command in front of which /dev/shm has this size."""
    script = f'mount -t tmpfs -o size={mib}m tmpfs /dev/shm && exec "$@"'
    before = ("unshare", "-m", "bash", "-c", script, "bash")
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    return before


def test_the_larger_payload_runs_in_the_shm_of_a_container() -> None:
    done = demo("--json", "--payload", "embeddings", before=with_shm(64))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_equal"]


def test_too_small_a_shm_is_told_in_numbers() -> None:
    done = demo("--json", "--tokens", "1", before=with_shm(8))
    assert (done.returncode, done.stdout) == (1, "")
    assert "pool_refused" in done.stderr
    assert "the tmpfs has" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tokens", "70000"], "1<=x<=65536"),
        (["--tokens", "0"], "1<=x<=65536"),
        (["--handoff", "--block-reuse"], "--block-reuse"),
    ],
)
def test_what_cannot_be_done_is_wrong_usage(args: list[str], words: str) -> None:
    done = demo(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_limit_is_the_models() -> None:
    assert llama.CONTEXT_TOKENS_MAX == multimodal.CONTEXT_TOKENS_MAX == 65536


def test_settings_of_another_daemon_are_not_the_demos() -> None:
    env = {"KVFERRY_PEER_PORT": "50007", "KVFERRY_WINDOW_TOKENS": "7", "KVFERRY_NOSUCH": "x"}
    done = demo("--json", "--tokens", "300", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 300


def test_the_rate_is_that_of_bytes_on_their_way() -> None:
    start_s = time.monotonic()
    result = json.loads(demo("--json").stdout)
    took_s = time.monotonic() - start_s
    assert 0 < result["seconds_transfer"] < took_s / 4, "waiting for prefill is not in it"
    assert result["gigabytes_per_s"] * result["seconds_transfer"] * 1e9 <= (
        1.01 * result["bytes_moved"] + 1e5
    )
    handed = json.loads(demo("--json", "--handoff", "--tokens", "300").stdout)
    assert (handed["seconds_transfer"], handed["gigabytes_per_s"]) == (0, None)
