"""The source worker of a measurement: a process that opens, fills and marks ready when told."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from bench.payload import Payload, numbered
from kvferry_client import Client, Layout, Role, State, connect
from kvferry_proto import worker

BATCH = worker.BATCH_MAX


def batched(client: Client, calls: list[Any]) -> list[worker.Snapshot]:
    """Make many calls in few frames; the snapshot of each."""
    found = []
    for first in range(0, len(calls), BATCH):
        reply = client.call(worker.Batch(calls=calls[first : first + BATCH]))
        for one in reply.replies:
            assert isinstance(one, worker.Snapshots), one
            found += one.transfers
    return found


def wait_all(
    client: Client, seen: list[worker.Snapshot], condition: Callable[[worker.Snapshot], bool]
) -> list[worker.Snapshot]:
    """Poll until all these transfers fit; their last snapshots, in the same order."""
    latest = {one.transfer_id: one for one in seen}
    while left := [one for one in latest.values() if not condition(one)]:
        watched = [
            worker.Watched(role=one.role, transfer_id=one.transfer_id, after=one.snapshot)
            for one in left
        ]
        reply = client.poll(*watched[: worker.POLL_MAX], wait_s=5.0)
        assert not reply.refused, reply.refused
        for one in reply.transfers:
            assert one.state is not State.FAILED, one.error
            latest[one.transfer_id] = one
    return [latest[one.transfer_id] for one in seen]


def has_succeeded(seen: worker.Snapshot) -> bool:
    """For `wait_all`."""
    return seen.state is State.SUCCESS


def offer(client: Client, payload: Payload, layout: Layout, ids: list[str], tokens: int) -> Any:
    """Open a source side for each id, fill all its tokens and mark them ready; the snapshots."""
    opened = batched(
        client,
        [worker.Send(transfer_id=i, total_tokens=tokens, window_tokens=tokens) for i in ids],
    )
    opened = wait_all(client, opened, lambda seen: seen.allocated_tokens == tokens)
    blocks = tokens // layout.block_size_tokens
    for index, one in enumerate(opened):
        payload.fill(numbered(one.runs, 0, layout, index * blocks))
    return batched(client, [worker.Ready(transfer_id=i, ready_tokens=tokens) for i in ids])


def let_go(client: Client, role: Role, ids: list[str]) -> None:
    """Release them all."""
    batched(client, [worker.Release(role=role, transfer_id=i) for i in ids])


def _serve(directory: Path, layout: Layout, pipe: Any) -> None:
    with connect(directory, layout, "source") as client:
        payload = Payload(client.pool.info, layout)
        pipe.send("joined")
        while (told := pipe.recv()) is not None:
            ids, tokens = told
            ready = offer(client, payload, layout, ids, tokens)
            pipe.send("ready")
            pipe.recv()
            wait_all(client, ready, has_succeeded)
            let_go(client, Role.SOURCE, ids)
            pipe.send("over")


class SourceWorker:
    """That process, as its starter has it."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(directory, layout, theirs))
        self._process.start()
        theirs.close()  # so that its end is seen here
        self._pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.join()

    def offer(self, ids: list[str], tokens: int) -> None:
        """Make payloads of so many tokens each ready to be pulled."""
        self._pipe.send((ids, tokens))
        self._pipe.recv()

    def over(self) -> None:
        """They have been received: wait for their end."""
        self._pipe.send("over")
        self._pipe.recv()
