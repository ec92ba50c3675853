"""SGLang engines in process groups of their own, over stubs of what a CPU has not."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from vllm_live.engines import MODEL, Answer

START_S = 300.0
DRIVER = Path(__file__).with_name("engine_process.py")
STUBS = Path(__file__).with_name("stubs")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(STUBS),
    "PYTHONWARNINGS": "ignore",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "40",
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",  # makes CUDA's events
    "SGLANG_USE_CPU_ENGINE": "1",
}
# A step of a long prompt takes seconds here, in which a transfer does not move.
FLAGS = {"window_tokens": 4096, "pool_tokens": 32_768, "lease_s": 15, "stall_s": 30}
OPTIONS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "chunked_prefill_size": 2048,
    "context_length": 24_576,
    "device": "cpu",
    "disaggregation_decode_retraction_backup": "cpu_tensor",  # the other one is CUDA's
    "dtype": "float32",
    "grammar_backend": "none",
    "host": "127.0.0.1",
    "log_level": "info",
    "max_running_requests": 40,
    "max_total_tokens": 100_000,
    "sampling_backend": "pytorch",
    "skip_tokenizer_init": True,
}


def make_model(directory: Path, kind: str = "llama", head_dim: int = 32) -> Path:
    """A random model whose tokens tell when its cache is wrong: see ``vllm_live.engines``."""
    command = [sys.executable, "-c", MODEL, str(directory), kind, str(head_dim)]
    environment = os.environ | ENVIRONMENT
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    return directory


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a moment that has to come: prefill computes a prompt to its end, wanted or not."""
    until_s = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.05)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Engine:
    """One engine. Leaves no process behind, whatever happens."""

    def __init__(
        self,
        log: Path,
        model: Path,
        mode: str = "null",
        directory: Path | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Start it; ``wait`` until it is there. ``directory``: its daemon's."""
        self.bootstrap_port = free_port()
        told = {**OPTIONS, **options}
        if mode != "null":
            told["disaggregation_mode"] = mode
            told["disaggregation_transfer_backend"] = "kvferry"
            told["disaggregation_bootstrap_port"] = self.bootstrap_port
        self._numbers = itertools.count()
        self._answers: dict[str, Future[dict[str, Any]]] = {}
        self._ready = threading.Event()
        self.log_path = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVER), str(model), json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    "KVFERRY_RUNTIME_DIR": str(directory),
                    **(environment or {}),
                },
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def wait(self) -> Self:
        """Until it takes requests."""
        assert self._ready.wait(START_S), self.log()[-4000:]
        assert self.process.poll() is None, self.log()[-4000:]
        return self

    def wait_for_end(self) -> str:
        """Until it has given up to start; its log."""
        self.process.wait(START_S)
        return self.log()

    def kill(self) -> None:
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def log(self) -> str:
        """What it wrote to stderr."""
        return self.log_path.read_text(errors="replace")

    def meeting(self, room: int) -> dict[str, Any]:
        """What a router tells both engines, if this one is prefill."""
        return {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": room,
        }

    def generate(
        self,
        prompt: list[int],
        max_tokens: int = 16,
        meeting: dict[str, Any] | None = None,
        logprobs: bool = False,
    ) -> Answer:
        """Begin to generate; ``meeting``: where prefill and decode find each other."""
        return self._say(
            prompt=prompt, max_tokens=max_tokens, meeting=meeting or {}, logprobs=logprobs
        )

    def abort(self, answer: Answer) -> None:
        """Abort what was begun."""
        self._write({"abort": answer.name})

    def blocks_are_free(self) -> bool:
        """Whether no request is left. SGLang looks for lost slots by itself, and dies of one."""
        return bool(self._say(blocks=True).result()["are_free"])

    def _say(self, **told: Any) -> Answer:
        name = f"request-{next(self._numbers)}"
        answer: Future[dict[str, Any]] = Future()
        self._answers[name] = answer
        self._write({"id": name, **told})
        return Answer(name, answer)

    def _write(self, told: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith('{"'):
                continue  # something of SGLang's prints
            said = json.loads(line)
            if "ready" in said:
                self._ready.set()
            else:
                self._answers.pop(said["id"]).set_result(said)
        self._ready.set()  # or somebody waits for the dead
        for answer in self._answers.values():
            answer.set_result({"error": "the engine ended"})
