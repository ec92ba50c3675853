"""The README's example and its commands, run as they stand there."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from live import LiveDaemon

README = Path(__file__).parent.parent / "README.md"
BIN = Path(sys.executable).parent


def test_the_worker_example_moves_a_payload(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    example: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), example)  # noqa: S102  the example is ours
    prefill, decode = example["prefill"], example["decode"]
    assert callable(prefill)
    assert callable(decode)
    array = np.random.default_rng(0).standard_normal((1000, 2, 32), dtype=np.float32)
    pieces = [(first, array[first : first + 300]) for first in range(0, 1000, 300)]
    flags = {"window_tokens": 256, "pool_tokens": 1024}
    with LiveDaemon(tmp_path / "a", **flags) as a, LiveDaemon(tmp_path / "b", **flags) as b:
        thread = threading.Thread(target=prefill, args=(a.directory, pieces))
        thread.start()
        windows = list(decode(b.directory, a.address))
        thread.join()
    assert [first for first, _ in windows] == sorted({first for first, _ in windows})
    np.testing.assert_array_equal(np.concatenate([part for _, part in windows]), array)


def test_the_commands_do_what_the_readme_says(tmp_path: Path) -> None:
    lines = re.findall(
        r"^    (kvferry (?:serve|status|transfers).*)$", README.read_text(), re.MULTILINE
    )
    assert len(lines) == 3
    serve, *asks = [line.replace("/dev/shm/kvferry", str(tmp_path / "d")) for line in lines]
    daemon = subprocess.Popen(_command(serve), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert daemon.stdout is not None
        assert json.loads(daemon.stdout.readline())["pid"] == daemon.pid
        for ask, code in zip(asks, (0, 5), strict=True):  # 5: nobody has opened request-1
            done = subprocess.run(_command(ask), capture_output=True, text=True, check=False)
            assert (done.returncode, bool(done.stdout)) == (code, True), done
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0
        done = subprocess.run(_command(asks[0]), capture_output=True, text=True, check=False)
        assert done.returncode == 4
        assert "daemon_unreachable" in done.stderr
    finally:
        daemon.kill()
        daemon.wait()
        assert daemon.stdout is not None
        daemon.stdout.close()


def test_a_second_daemon_names_the_first(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as first:
        command = _command(f"kvferry serve --runtime-dir {first.directory}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert f"pid {first.process.pid}" in done.stderr
        assert first.status().pid == first.process.pid


def _command(line: str) -> list[str]:
    return [str(BIN / "kvferry"), *line.split()[1:]]
