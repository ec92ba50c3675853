"""Answers to workers: what is in them once, and what does not fit into a frame is not even encoded."""

from collections.abc import Iterable

from kvferry_proto.codec import FRAME_BYTES_MAX
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.worker import Failure, Snapshot, Snapshots, Watched

SNAPSHOT_BYTES = 200  # of names and numbers, at least
RUN_BYTES = 3
FAILURE_BYTES = 64


def once_each(asked: Iterable[Watched]) -> Iterable[Watched]:
    """What a poll asks for; of a transfer that it names again, only how it named it last."""
    return {(one.role, one.transfer_id, one.attempt, one.rank): one for one in asked}.values()


def least_bytes(answer: Snapshots | Failure) -> int:
    """How long an answer is at least, at a glance: it may be four times as long."""
    if isinstance(answer, Failure):
        return FAILURE_BYTES
    return sum(map(_of_snapshot, answer.transfers)) + FAILURE_BYTES * len(answer.refused)


def check_fits(answer: Snapshots, room_bytes: int = FRAME_BYTES_MAX) -> None:
    """Raise FerryError(resource_exhausted) for an answer that cannot fit."""
    if least_bytes(answer) > room_bytes:
        raise FerryError(
            Code.RESOURCE_EXHAUSTED,
            f"the answer does not fit into a frame of {FRAME_BYTES_MAX} bytes: ask for less at once; "
            "all but polls has been done",
        )


def _of_snapshot(seen: Snapshot) -> int:
    size = SNAPSHOT_BYTES + RUN_BYTES * len(seen.runs)
    if seen.aux is not None:
        size += sum(len(value) for value in seen.aux.values() if isinstance(value, str | bytes))
    return size
