"""What a router says to engines, and what one waits for afterwards."""

import random
import time
from collections.abc import Callable
from typing import Any

from live import LiveDaemon
from vllm_live.engines import Answer

FLAGS = {"window_tokens": 4096, "pool_tokens": 32_768, "lease_s": 8, "stall_s": 8, "lost_s": 6}


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a moment that has to come."""
    until_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Tokens that nobody has seen before."""
    return random.Random(f"{tokens} {seed}").choices(range(3, 512), k=tokens)


def sending(name: str, attempt: int = 0) -> dict[str, Any]:
    """What a router tells prefill."""
    return {"do_remote_decode": True, "transfer_id": name, "attempt": attempt}


def fetching(name: str, source: LiveDaemon) -> dict[str, Any]:
    """What a router tells decode, if it does not have it from prefill."""
    return {"do_remote_prefill": True, "transfer_id": name, "attempt": 0, "source": source.address}


def failed(answer: Answer) -> bool:
    """Whether a request ended with an error."""
    said = answer.result()
    return "error" in said or said["reason"] == "error"
