"""What is remembered is counted as it comes and goes, so that nobody has to walk over it."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvferry_daemon.core.events import Done, Key
from kvferry_daemon.core.tombstones import TOMBSTONES_MAX, UNKNOWN_MAX, Tombstones
from kvferry_proto.errors import Code
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.states import Role, State
from kvferry_proto.worker import Snapshot

KEEP_S = 10.0
ALL = 1 << 20
ENDS = st.sampled_from([State.SUCCESS, State.FAILED])
LATE = Done(state=State.SUCCESS, error=None)
STEPS = st.tuples(
    st.sampled_from(["ended", "unknown", "done", "time"]),
    st.integers(0, 5),
    ENDS,
    st.integers(1, 6),
)


def _snapshot(key: Key, state: State) -> Snapshot:
    error = ErrorInfo.of(Code.LEASE_EXPIRED, "") if state is State.FAILED else None
    return Snapshot(
        role=key.role,
        transfer_id=key.transfer_id,
        attempt=key.attempt,
        snapshot=1,
        state=state,
        error=error,
    )


@given(st.lists(STEPS))
def test_states_are_counted_as_they_are(steps: list[tuple[str, int, State, int]]) -> None:
    stones, now_s = Tombstones(KEEP_S), 0.0
    for what, number, state, passed_s in steps:
        key = Key(Role.SINK, f"t{number}", 0)
        if what == "ended":
            stones.add(key, _snapshot(key, state), (), now_s)
        elif what == "unknown":
            stones.add_unknown(key, Done(state=State.FAILED, error=None), now_s)
        elif what == "done" and stones.get(key):
            stones.on_done(key, LATE)
        elif what == "time":
            now_s += passed_s
            stones.expire(now_s, ALL)
        assert +stones.states == Counter(snapshot.state for snapshot in stones.snapshots())


def test_ends_of_what_nobody_opened_drive_out_no_end_that_somebody_asks_for() -> None:
    """A peer may say of any name that it is over; a worker asks how its own transfer ended."""
    stones, done = Tombstones(KEEP_S), Done(state=State.FAILED, error=None)
    ours = Key(Role.SOURCE, "ours", 0)
    stones.add(ours, _snapshot(ours, State.SUCCESS), ("session",), 0.0)
    for number in range(TOMBSTONES_MAX + 1):
        stones.add_unknown(Key(Role.SOURCE, f"t{number}", 0), done, 1.0)
    gone = stones.expire(2.0, ALL)
    assert len(stones) == UNKNOWN_MAX + 1
    assert stones.get(ours) is not None
    assert gone == [
        Key(Role.SOURCE, f"t{number}", 0) for number in range(TOMBSTONES_MAX + 1 - UNKNOWN_MAX)
    ]
    assert stones.get(Key(Role.SOURCE, f"t{TOMBSTONES_MAX}", 0)) is not None
    assert len(stones.expire(100.0, ALL)) == UNKNOWN_MAX + 1
    assert stones.expire(100.0, ALL) == []
