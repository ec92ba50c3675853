"""SGLang engines in process groups of their own, over stubs of what a CPU has not."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_live
from engine_live import START_S, Answer, EngineProcess

DRIVER = Path(__file__).with_name("engine_process.py")
STUBS = Path(__file__).with_name("stubs")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(STUBS),
    "PYTHONWARNINGS": "ignore",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "40",
    "SGLANG_USE_CPU_ENGINE": "1",
}
# A step of a long prompt takes seconds here, in which a transfer does not move.
# Nor is the engine's thread for moving bytes always let run.
FLAGS = {"window_tokens": 4096, "pool_tokens": 32_768, "lease_s": 15, "stall_s": 30, "lost_s": 10}
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


def make_model(directory: Path, kind: str = "llama", seed: int = 7, **shape: int) -> Path:
    """A random model: see ``engine_live``. Stubs stand for what transformers imports here, too."""
    return engine_live.make_model(directory, kind, seed, ENVIRONMENT, **shape)


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


class Engine(EngineProcess):
    """One engine of SGLang's."""

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
        where = {"KVFERRY_RUNTIME_DIR": str(directory)}
        super().__init__(DRIVER, log, model, told, {**ENVIRONMENT, **where, **(environment or {})})

    def wait_for_end(self) -> str:
        """Until it has given up to start; its log."""
        self.process.wait(START_S)
        return self.log()

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
