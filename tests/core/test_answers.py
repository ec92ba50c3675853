"""How long an answer is at a glance: never longer than it is, so that nothing is refused that fits."""

import pytest

from kvferry_daemon.core.answers import check_fits, least_bytes, once_each
from kvferry_proto.codec import FRAME_BYTES_MAX
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import Role, State
from kvferry_proto.worker import REPLIES, Failure, Refused, Snapshot, Snapshots, Watched

LEAST = Snapshot(role=Role.SINK, transfer_id="t", attempt=0, snapshot=0, state=State.FAILED)
ERROR = ErrorInfo(code="", fault="", message="", remedy="")
REFUSED = Refused(role=Role.SINK, transfer_id="t", attempt=0, error=ERROR)


@pytest.mark.parametrize(
    "answer",
    [
        Snapshots(),
        Snapshots(transfers=[LEAST] * 1000),
        Snapshots(transfers=[LEAST.model_copy(update={"runs": [(0, 0)] * 1000})]),
        Snapshots(transfers=[LEAST.model_copy(update={"aux": {"a": b"x" * 9, "b": "ä", "c": 1}})]),
        Snapshots(refused=[REFUSED] * 1000),
        Failure(error=ErrorInfo.of(Code.DRAINING, "")),
    ],
)
def test_it_is_at_least_so_long(answer: Snapshots | Failure) -> None:
    assert least_bytes(answer) <= len(REPLIES.encode(answer))


def test_what_does_not_fit_is_refused() -> None:
    answer = Snapshots(transfers=[LEAST.model_copy(update={"aux": {"a": b"x" * 1000}})])
    check_fits(answer, least_bytes(answer))
    with pytest.raises(FerryError, match="ask for less at once") as caught:
        check_fits(answer, least_bytes(answer) - 1)
    assert (caught.value.code, caught.value.retry_after_s) == (Code.RESOURCE_EXHAUSTED, None)
    with pytest.raises(FerryError):
        check_fits(Snapshots(transfers=[LEAST] * (FRAME_BYTES_MAX // 200 + 1)))


def test_of_what_is_asked_for_twice_the_last_word_counts() -> None:
    first, last, other = (
        Watched(role=Role.SINK, transfer_id=name, after=after)
        for name, after in (("t", 1), ("t", 2), ("u", 1))
    )
    assert list(once_each([first, other, last])) == [last, other]
