"""`python -m faults.worker ROLE RUNTIME_DIR RESULTS_DIR`: a worker that does what it reads.

A line on stdin is one attempt; its outcome is a file, so that nothing is lost with the process.
"""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from client.payloads import LAYOUT, WINDOW, pieces
from faults.points import LOOK_S, set_trap
from kvferry_client import Client, FerryError, connect

TOKENS = 4 * WINDOW + 5
PIECE = 24  # tokens that prefill brings at a time: they fit neither blocks nor windows
WAIT_S = 28.0


def content(name: str, attempt: int) -> dict[str, np.ndarray]:
    """Bytes that differ for every attempt: those of another one would be found out."""
    rng = np.random.default_rng([attempt, *name.encode()])
    return {
        "k": rng.standard_normal((TOKENS, 2, 3), dtype=np.float32),
        "bf": rng.integers(0, 1 << 15, (TOKENS, 4), dtype=np.uint16),
        "ids": rng.integers(0, 1 << 60, TOKENS, dtype=np.int64),
    }


def prefill(client: Client, name: str, attempt: int, **_rest: Any) -> None:
    """Fill, and wait until the sink has said how it ended."""
    arrays = content(name, attempt)
    with client.send(name, attempt=attempt) as sending:
        for first, piece in pieces(arrays, PIECE):
            last = first + PIECE >= TOKENS
            sending.fill(first, piece, aux={"first_token": attempt} if last else None)
    sending.wait(WAIT_S)


def decode(client: Client, name: str, attempt: int, source: str, pause: str | None) -> None:
    """Take every window over, and compare every byte."""
    expected, at = content(name, attempt), 0
    with client.receive(name, attempt=attempt, source=source) as receiving:
        for window in receiving:
            assert window.first_token == at, (window.first_token, at)
            for plane, array in expected.items():
                got = window.gather(plane)
                assert got.tobytes() == array[at : window.end_token].tobytes(), (plane, at)
            at = window.end_token
            if pause is not None and at == 2 * WINDOW:
                wait_at(Path(pause))
        assert at == TOKENS, at
        assert receiving.aux == {"first_token": attempt}


def wait_at(directory: Path) -> None:
    """Tell that we are here, and wait to be told to go on."""
    (directory / "paused").touch()
    while not (directory / "unpaused").exists():
        time.sleep(LOOK_S)


def attempt(client: Client, do: Any, order: dict[str, Any], outcome: Path) -> None:
    """Make one attempt; anything but an error that the client promises is the process's end."""
    said = None
    try:
        do(client, **order)
        said = ""
    except FerryError as error:
        said = f"{error.code}: {error.message}"
    finally:
        if said is None:
            traceback.print_exc()
            os._exit(1)
    part = outcome.with_suffix(f"{outcome.suffix}-part")
    part.write_text(said)
    part.rename(outcome)


def main(role: str, runtime_dir: Path, results: Path) -> None:
    """Make attempts until stdin ends, each in a thread: a newer one ends an older one."""
    set_trap()
    do = {"prefill": prefill, "decode": decode}[role]
    threads = []
    with connect(runtime_dir, LAYOUT, role) as client:
        (results / f"{role}.joined").touch()
        for line in sys.stdin:
            order = json.loads(line)
            outcome = results / f"{order['name']}.{order['attempt']}.{role}"
            threads.append(threading.Thread(target=attempt, args=(client, do, order, outcome)))
            threads[-1].start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
