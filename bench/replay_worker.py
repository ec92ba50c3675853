"""One worker of a replay: `python -m bench.replay_worker DIRECTORY`, with the asyncio client.

It reads one JSON line that says what it is and its jobs, answers ``"ready"``, reads the moment at
which the trace begins (``time.monotonic``, which all processes share), and answers with what it saw.
"""

import asyncio
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.replay_plan import Job, Model
from kvferry_client import AsyncClient, Dtype, FerryError, Layout, Mode, Plane, WindowView
from kvferry_client.aio import AsyncReceiving
from kvferry_client.logic import MUST_TAKE

WORDS_A_TOKEN = 4
PLANE = "kv"
LAYOUT = Layout(planes=(Plane(name=PLANE, dtype=Dtype.INT64, shape=(WORDS_A_TOKEN,)),))


def content(number: int, first: int, end: int) -> np.ndarray[Any, Any]:
    """The tokens [first, end) of a transfer: each word says transfer, token and place."""
    tokens = np.arange(first, end, dtype=np.int64) + (number << 32)
    return tokens[:, None] + (np.arange(WORDS_A_TOKEN) << 24)


def share(places: int, processes: int) -> int:
    """How many of all places one process has."""
    return -(-places // processes)


@dataclass(frozen=True)
class Clock:
    """The trace's time: ``speed`` of its seconds pass in one of ours."""

    begun_s: float
    speed: float

    async def until(self, at_s: float) -> None:
        """Sleep until a moment of the trace."""
        await self.sleep_to(self.begun_s + at_s / self.speed)

    async def sleep_to(self, moment_s: float) -> None:
        """Sleep until a moment of ours; gone by, it lets others go first."""
        await asyncio.sleep(max(0.0, moment_s - time.monotonic()))


class Worker:
    """What prefill and decode have in common."""

    def __init__(self, client: AsyncClient, model: Model, clock: Clock) -> None:
        self.client = client
        self.model = model
        self.clock = clock
        self.failures: list[str] = []
        self.seen: dict[int, dict[str, float]] = {}  # moments by the job's number

    async def run(self, jobs: list[Job]) -> dict[str, Any]:
        """Do all jobs, each at its time."""
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                await self.clock.until(job.at_s)
                group.create_task(self._one(job))
        return {"seen": self.seen, "failures": self.failures, **self.result()}

    def result(self) -> dict[str, Any]:
        """What more there is to tell."""
        return {}

    async def _one(self, job: Job) -> None:
        self.seen[job.number] = {}
        try:
            await self.work(job, f"request-{job.number}")
        except (FerryError, AssertionError) as error:
            self.failures.append(f"{type(self).__name__} {job}: {error}"[:600])

    async def work(self, job: Job, name: str) -> None:
        """Do one job."""
        raise NotImplementedError


class Prefill(Worker):
    """Computes requests, so many at once, and fills blocks with what it has."""

    def __init__(self, client: AsyncClient, model: Model, clock: Clock) -> None:
        super().__init__(client, model, clock)
        self.slots = asyncio.Semaphore(share(model.prefill_slots, model.prefill_workers))

    async def work(self, job: Job, name: str) -> None:
        rate = self.model.prefill_tokens_a_s * self.model.speed
        async with self.slots:
            begun_s = time.monotonic()
            sending = await self.client.send(
                name,
                start_tokens=job.start_tokens,
                total_tokens=job.total_tokens,
                window_tokens=job.moved_tokens,
            )
            async with sending:
                for first in range(job.start_tokens, job.total_tokens, self.model.piece_tokens):
                    end = min(first + self.model.piece_tokens, job.total_tokens)
                    await self.clock.sleep_to(begun_s + (end - job.start_tokens) / rate)
                    if end == job.total_tokens:
                        self.seen[job.number]["computed_s"] = time.monotonic()
                    await sending.fill(first, {PLANE: content(job.number, first, end)})


class Decode(Worker):
    """Takes payloads over, so many requests at once."""

    def __init__(
        self, client: AsyncClient, model: Model, clock: Clock, source: str, mode: Mode
    ) -> None:
        super().__init__(client, model, clock)
        self.source = source
        self.mode = mode
        self.places = asyncio.Semaphore(share(model.decodes, model.decode_workers))
        self.verified_tokens = 0
        self.stall_s: defaultdict[str, float] = defaultdict(float)

    def result(self) -> dict[str, Any]:
        return {"verified_tokens": self.verified_tokens, "stall_s": dict(self.stall_s)}

    async def work(self, job: Job, name: str) -> None:
        async with self.places:
            receiving = await self.client.receive(
                name,
                source=self.source,
                mode=self.mode,
                start_tokens=job.start_tokens,
                max_tokens=job.total_tokens if self.mode is Mode.WHOLE else None,
            )
            async with receiving:
                await self._take(job, receiving)
            self.seen[job.number]["taken_s"] = time.monotonic()
            await asyncio.sleep(job.output_tokens / self.model.output_tokens_a_s / self.model.speed)

    async def _take(self, job: Job, receiving: AsyncReceiving) -> None:
        """Copy tokens out as they come. Consume mode gives their blocks back; whole keeps them."""
        logic, taken, copied_s = receiving.logic, job.start_tokens, time.monotonic()
        rate = self.model.copy_tokens_a_s * self.model.speed
        while taken < job.total_tokens:
            await self._until_due(job, receiving, taken)
            end = min(logic.now.sent_tokens, taken + self.model.piece_tokens)
            copied_s = max(copied_s, time.monotonic()) + (end - taken) / rate
            self._check(job, logic.view(taken, end))
            await self.clock.sleep_to(copied_s)
            taken = end
            if self.mode is Mode.CONSUME and not receiving.ended:
                await receiving.resume(taken)
        await self._until_due(job, receiving, taken)
        assert receiving.total_tokens == taken, receiving.snapshot

    async def _until_due(self, job: Job, receiving: AsyncReceiving, taken: int) -> None:
        """Wait for a piece, for what must be taken, or for the end."""
        logic, piece = receiving.logic, self.model.piece_tokens
        while not logic.ended:
            now = logic.now
            fresh = now.sent_tokens - taken
            if fresh >= piece or (fresh > 0 and now.stall in MUST_TAKE):
                return
            begun_s = time.monotonic()
            await self.client.drive(logic.change(), logic.pool)
            if now.stall is not None:
                self.stall_s[now.stall.value] += time.monotonic() - begun_s
        self.seen[job.number].setdefault("ended_s", time.monotonic())
        logic.raise_if_failed()

    def _check(self, job: Job, window: WindowView) -> None:
        got = window.gather(PLANE)
        expected = content(job.number, window.first_token, window.end_token)
        wrong = np.flatnonzero((got != expected).any(axis=1))
        assert not len(wrong), f"{len(wrong)} tokens are wrong, the first is {wrong[0]}"
        self.verified_tokens += len(got)


async def main(directory: Path) -> None:
    """Be what the parent says."""
    told = json.loads(sys.stdin.readline())
    model, jobs = Model(**told["model"]), [Job(*job) for job in told["jobs"]]
    async with AsyncClient(directory, LAYOUT, told["role"]) as client:
        print(json.dumps("ready"), flush=True)
        begun_s = json.loads(await asyncio.to_thread(sys.stdin.readline))
        clock = Clock(begun_s, model.speed)
        worker: Worker
        if told["role"] == "prefill":
            worker = Prefill(client, model, clock)
        else:
            worker = Decode(client, model, clock, told["source"], Mode(told["mode"]))
        print(json.dumps(await worker.run(jobs)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
