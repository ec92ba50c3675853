"""One worker of the soak: `python -m bench.soak_worker DIRECTORY`, with the real client.

Every line that it reads is a `Job`, done in a thread of its own; every line that it writes says
how one ended. What a payload holds follows from the job, so both ends know every byte of it.

`python -m bench.soak_worker DIRECTORY locked` (or `hello`) is a worker that is killed at the worst
moment: its lock is taken and no hello is said, or no answer to it was read.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from kvferry_client import Client, Dtype, FerryError, Layout, Mode, Plane, WindowView, connect
from kvferry_client.session import Session
from kvferry_proto import worker

BLOCK_TOKENS = 16
WINDOW_TOKENS = 64
LAYOUT = Layout(
    planes=(
        Plane(name="kv", dtype=Dtype.INT32, shape=(2, 8)),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    aux=("first_token",),
    block_size_tokens=BLOCK_TOKENS,
)
END_S = 60.0
ABORTED, DONE, FAILED, WRONG = "aborted", "done", "failed", "wrong"


@dataclass(frozen=True)
class Job:
    """One side of one attempt."""

    transfer_id: str
    attempt: int
    role: str
    tokens: int
    source: str | None = None  # the daemon to pull from; None is this one
    mode: str = Mode.CONSUME.value
    is_total_early: bool = False
    abort_at_tokens: int | None = None
    begin_after_s: float = 0.0
    window_tokens: int | None = None
    world_size: int = 1
    rank: int = 0  # of a group, whose ranks are threads of one worker

    @property
    def seed(self) -> int:
        """The same on both sides, another one for every attempt and rank."""
        name = f"{self.transfer_id} {self.attempt} {self.rank}"
        return random.Random(name).randrange(1 << 20)

    @property
    def aux(self) -> dict[str, int]:
        """All ranks tell the same."""
        return {"first_token": replace(self, rank=0).seed}


def content(job: Job, first: int, end: int) -> dict[str, np.ndarray[Any, Any]]:
    """The payload's tokens [first, end)."""
    tokens = np.arange(first, end, dtype=np.int64)
    kv = tokens[:, None] * 31 + np.arange(16) * 7 + job.seed
    return {"kv": kv.astype(np.int32).reshape(-1, 2, 8), "ids": tokens + (job.seed << 32)}


def send(client: Client, job: Job) -> str:
    """The source side, from opening to the sink's last token."""
    rng = random.Random(job.seed)
    aux: dict[str, Any] = dict(job.aux)
    with client.send(
        job.transfer_id,
        attempt=job.attempt,
        rank=job.rank,
        world_size=job.world_size,
        total_tokens=job.tokens if job.is_total_early else None,
        aux=aux if job.is_total_early else None,
        window_tokens=job.window_tokens,
    ) as sending:
        at = 0
        while at < job.tokens:
            end = min(job.tokens, at + rng.choice((1, 5, BLOCK_TOKENS, WINDOW_TOKENS, 150)))
            sending.fill(at, content(job, at, end))
            at = end
            if job.abort_at_tokens is not None and at >= job.abort_at_tokens:
                sending.abort("as planned")
                return ABORTED
        sending.finish(aux=aux)
        sending.wait(END_S)
    return DONE


def receive(client: Client, job: Job) -> str:
    """The sink side; raises AssertionError for a token that is not what was sent."""
    taken = 0
    with client.receive(
        job.transfer_id,
        attempt=job.attempt,
        rank=job.rank,
        world_size=job.world_size,
        source=job.source,
        mode=Mode(job.mode),
        max_tokens=job.tokens + 3 if job.mode == Mode.WHOLE.value else None,
        window_tokens=job.window_tokens,
    ) as receiving:
        for window in receiving:
            check(job, window, taken)
            taken = window.end_token
            if job.abort_at_tokens is not None and taken >= job.abort_at_tokens:
                receiving.abort("as planned")
                return ABORTED
        assert taken == receiving.total_tokens == job.tokens, (taken, receiving.snapshot)
        assert receiving.aux == job.aux, receiving.snapshot
    return DONE


def check(job: Job, window: WindowView, taken: int) -> None:
    """Every byte, and no token twice."""
    assert window.first_token == taken, (window.first_token, taken)
    for name, expected in content(job, taken, window.end_token).items():
        got = window.gather(name)
        wrong = np.flatnonzero((got != expected).reshape(len(got), -1).any(axis=1))
        assert not len(wrong), f"{name}: {len(wrong)} tokens are wrong, the first is {wrong[0]}"


def one_rank(client: Client, job: Job) -> tuple[str, str]:
    """Do one rank's part; how it ended, and why."""
    try:
        return (send if job.role == "source" else receive)(client, job), ""
    except FerryError as error:
        return FAILED, f"{error.code}: {error}"
    except AssertionError as error:
        return WRONG, f"rank {job.rank}: {error}"


def work(client: Client, job: Job, saying: threading.Lock) -> None:
    """Do one job and say how it ended: for a group, as it did for the worst off of its ranks."""
    time.sleep(job.begin_after_s)
    ranks = [
        replace(job, rank=rank, abort_at_tokens=None if rank else job.abort_at_tokens)
        for rank in range(job.world_size)
    ]
    with ThreadPoolExecutor(job.world_size) as pool:
        ends = list(pool.map(lambda rank: one_rank(client, rank), ranks))
    order = (WRONG, ABORTED, FAILED, DONE)
    outcome, detail = min(ends, key=lambda end: order.index(end[0]))
    line = json.dumps({"job": asdict(job), "outcome": outcome, "detail": detail[:400]})
    with saying:
        print(line, flush=True)


def end_at_once(args: threading.ExceptHookArgs) -> None:
    """What nobody expected must be seen: a worker that ends by itself is a violation."""
    traceback.print_exception(args.exc_value)
    os._exit(1)


def die(directory: Path, when: str) -> None:
    """Be killed before the daemon's welcome."""
    try:
        session = Session(directory, LAYOUT, "unlucky")
    except FerryError:
        return  # its daemon has not begun its life
    if when == "hello":
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(session.address)
        socket.send(worker.CALLS.encode(session.hello()))
        socket.poll(1000)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Work until there is nothing more to read."""
    if len(sys.argv) > 2:
        die(Path(sys.argv[1]), sys.argv[2])
    threading.excepthook = end_at_once
    saying = threading.Lock()
    threads: list[threading.Thread] = []
    with connect(sys.argv[1], LAYOUT, f"soak {os.getpid()}") as client:
        for line in sys.stdin:
            threads = [thread for thread in threads if thread.is_alive()]
            thread = threading.Thread(target=work, args=(client, Job(**json.loads(line)), saying))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
