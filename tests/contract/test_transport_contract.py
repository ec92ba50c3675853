"""What every transport owes to the workers of a transfer, whatever carries the bytes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from kvferry_proto import worker
from kvferry_proto.states import TERMINAL, Role, State
from live import BLOCK, LAYOUT, WAIT_S, WINDOW

if TYPE_CHECKING:
    from contract.conftest import Pair

QUOTA = WINDOW * 3 // 2
LENGTHS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]
BOTH = [Role.SOURCE, Role.SINK]
PIECE = 16  # bytes; random ones do not come twice


def other(role: Role) -> Role:
    return Role.SINK if role is Role.SOURCE else Role.SOURCE


def error_of(seen: worker.Snapshot) -> tuple[str, str]:
    assert seen.state is State.FAILED, seen
    assert seen.error is not None
    return seen.error.code, seen.error.message


def test_the_transport_is_the_one_named(pair: Pair) -> None:
    flow = pair.flow(2 * WINDOW)
    names = ("blocks_handed_over", "bytes_copied", "bytes_received", "bytes_sent")
    before = {name: pair.counters(name) for name in names}
    flow.open(**({"source": None} if pair.sink is pair.source else {}))
    flow.run()
    payload = 2 * WINDOW // BLOCK * LAYOUT.block_bytes
    planes = sum(plane.token_bytes for plane in LAYOUT.planes)  # and no padding
    expected = {
        "handoff": [2 * WINDOW // BLOCK, 0, 0, 0],
        "copy": [0, 2 * WINDOW * planes, 0, 0],
    }.get(pair.transport, [0, 0, payload, payload])
    until_s = time.monotonic() + WAIT_S  # what is sent its own thread tells, maybe after the end
    while (moved := [pair.counters(name) - before[name] for name in names]) != expected:
        assert time.monotonic() < until_s, moved
        time.sleep(0.02)
    if pair.transport not in ("handoff", "copy"):
        [peer] = pair.sink.status().peers
        assert peer.streams_open == (2 if pair.transport == "tcp-2streams" else 1)


# --- bytes ---


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("total", LENGTHS)
def test_every_length_arrives_exactly(pair: Pair, total: int, late: bool) -> None:
    flow = pair.flow(total, late=late)
    flow.open()
    flow.run()
    full = list(range(WINDOW, total, WINDOW))
    assert flow.resumes[: len(full)] == full
    assert late or flow.resumes == full  # late: the last window may have to be taken over too


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("total", [0, 1, BLOCK, WINDOW + 1, QUOTA])
def test_whole_mode_keeps_everything_until_the_end(pair: Pair, total: int, late: bool) -> None:
    flow = pair.flow(total, late=late, whole=QUOTA)
    flow.open()
    end = flow.run()
    assert (end.base_tokens, end.last_resume_at, flow.resumes) == (0, -1, [])
    assert end.allocated_tokens >= total


@pytest.mark.parametrize(
    ("source_start", "sink_start", "total"),
    [
        (2 * BLOCK, 2 * BLOCK, 2 * BLOCK),
        (2 * BLOCK, 2 * BLOCK, 3 * WINDOW + 5),
        (0, 3 * BLOCK, WINDOW + 1),
        (BLOCK, QUOTA, 3 * WINDOW),
    ],
)
def test_a_prefix_that_the_sink_has_is_not_moved(
    pair: Pair, source_start: int, sink_start: int, total: int
) -> None:
    flow = pair.flow(total, start=source_start)
    flow.open_source()
    opened = flow.open_sink(start_tokens=sink_start)
    assert opened.sent_tokens == opened.start_tokens == sink_start
    flow.run()


def test_a_source_that_lacks_what_the_sink_asks_for_ends_both(pair: Pair) -> None:
    flow = pair.flow(WINDOW, start=2 * BLOCK)
    flow.open_source()
    flow.open_sink(start_tokens=BLOCK)
    assert error_of(flow.wait_end(Role.SINK))[0] == "start_mismatch"
    code, message = error_of(flow.wait_end(Role.SOURCE))
    assert code == "sink_failed"
    assert "start_mismatch" in message


@pytest.mark.parametrize("windows", [1, 3])
def test_the_total_may_come_after_all_was_taken_over(pair: Pair, windows: int) -> None:
    """The last window is full, taken over and freed before anybody knows that it was the last."""
    flow = pair.flow(windows * WINDOW)
    flow.open()
    for window in range(windows):
        end = (window + 1) * WINDOW
        while flow.now(Role.SOURCE).available_tokens < end:
            flow.ready(flow.now(Role.SOURCE).available_tokens + BLOCK)
        seen = flow.wait(Role.SINK, lambda s, end=end: s.sent_tokens == end)
        assert seen.total_tokens is None
        flow.resume(seen, end)
    flow.source.snapshot(
        worker.Ready(**flow.named, ready_tokens=flow.total, total_tokens=flow.total)
    )
    flow.wait_end(Role.SINK)
    flow.check_success()


def test_a_resume_within_the_window_slides_it(pair: Pair) -> None:
    flow = pair.flow(2 * WINDOW)
    flow.open()
    flow.ready(WINDOW)
    full = flow.wait(Role.SINK, lambda seen: seen.sent_tokens == WINDOW)
    at = WINDOW // 2 + 5
    slid = flow.resume(full, at)
    assert (slid.base_tokens, slid.partial_sent_tokens) == (at // BLOCK * BLOCK, at)
    flow.ready(QUOTA)
    more = flow.wait(Role.SINK, lambda seen: seen.sent_tokens == at // BLOCK * BLOCK + WINDOW)
    assert more.base_tokens == at // BLOCK * BLOCK
    assert flow.consumer.code(worker.Resume(**flow.named, sent_tokens=QUOTA + 1)) == "resume_ahead"
    for old in (at, BLOCK):  # repeated, stale
        same = flow.consumer.snapshot(worker.Resume(**flow.named, sent_tokens=old))
        assert same == flow.now(Role.SINK)
        assert same.last_resume_at == at
    flow.run()


@pytest.mark.parametrize(
    "pace",
    [
        {"ready_step": BLOCK, "eager": True},
        {"take_step": BLOCK},
        {"ready_step": BLOCK, "take_step": BLOCK},
        {"ready_step": 7, "take_step": 5, "eager": True},
    ],
    ids=["slow-source", "slow-sink", "single-blocks", "odd"],
)
def test_no_pace_of_either_side_matters(pair: Pair, pace: dict[str, Any]) -> None:
    flow = pair.flow(3 * WINDOW + 5, **pace)
    flow.open()
    flow.run()


def test_a_payload_larger_than_both_quotas_flows(pair: Pair) -> None:
    flow = pair.flow(8 * QUOTA + 3, late=True)
    flow.open()
    flow.run()


@pytest.mark.parametrize("told", ["with_send", "with_the_last_ready"])
@pytest.mark.parametrize("total", [0, WINDOW + 1])
def test_aux_values_arrive(pair: Pair, total: int, told: str) -> None:
    aux = {"token": 7, "text": "ab", "hidden": b"\x00\xff", "scale": -0.5}
    layout = LAYOUT.model_copy(update={"aux": tuple(aux)})
    flow = pair.flow(total, layout, aux=None if told == "with_send" else aux)
    flow.open_source(**({"aux": aux} if told == "with_send" else {}))
    flow.open_sink()
    assert flow.run().aux == aux


def test_two_transfers_share_room_for_one_and_a_half_windows(pair: Pair) -> None:
    one = pair.flow(4 * WINDOW, seed=1)
    two = pair.flow(4 * WINDOW + 3, seed=2, late=True, by=one.source, to=one.consumer)
    one.open()
    two.open()
    live = [one, two]
    while live:
        for flow in list(live):
            if flow.step().state in TERMINAL:
                assert min(one.taken, two.taken) >= WINDOW  # neither waited for the other's end
                flow.check_success()
                flow.release(Role.SINK)
                live.remove(flow)


def test_a_source_that_waits_for_blocks_gets_those_that_its_own_tokens_leave(pair: Pair) -> None:
    """Another transfer holds most of the source's quota and never moves."""
    idle = pair.flow(WINDOW)
    idle.open_source()
    idle.wait(Role.SOURCE, lambda seen: seen.allocated_tokens == WINDOW)
    flow = pair.flow(QUOTA - WINDOW + 1)
    flow.open()
    flow.run()


# --- ends ---


@pytest.mark.parametrize("who", BOTH)
def test_an_abort_ends_both_sides_and_blocks_wait_for_their_release(pair: Pair, who: Role) -> None:
    flow = pair.flow(3 * WINDOW)
    flow.to_the_middle()
    flow.abort(who, "preempted")
    assert error_of(flow.wait_end(who)) == ("aborted", f"by its {who}: preempted")
    code, message = error_of(flow.wait_end(other(who)))
    assert code == ("source_failed" if who is Role.SOURCE else "sink_failed")
    assert f"aborted: by its {who}: preempted" in message
    for role in (other(who), who):
        held = [daemon.status() for daemon in pair.daemons]
        assert any(status.blocks_free < status.blocks_total for status in held), role
        flow.release(role)
    for daemon in pair.daemons:
        daemon.wait_until_free()


@pytest.mark.parametrize("who", BOTH)
def test_a_worker_that_dies_ends_both_sides_and_strands_no_block(pair: Pair, who: Role) -> None:
    flow = pair.flow(3 * WINDOW)
    flow.to_the_middle()
    (flow.source if who is Role.SOURCE else flow.consumer).close()
    code, message = error_of(flow.wait_end(other(who)))
    assert code == ("source_failed" if who is Role.SOURCE else "sink_failed")
    assert "worker_lost" in message
    flow.release(other(who))
    for daemon in pair.daemons:
        daemon.wait_until_free()


def test_a_source_worker_that_dies_after_its_last_token_is_not_missed(pair: Pair) -> None:
    flow = pair.flow(WINDOW - 3)
    flow.open_source()
    flow.ready(flow.total, total_tokens=flow.total)
    flow.source.close()
    pair.wait_for_workers(1 if pair.sink is pair.source else 0)
    flow.open_sink()
    seen = flow.wait_end(Role.SINK)
    assert (seen.state, seen.sent_tokens) == (State.SUCCESS, flow.total)
    flow.consumer.check(seen)
    flow.release(Role.SINK)
    for daemon in pair.daemons:
        daemon.wait_until_free()


@pytest.mark.parametrize("who", BOTH)
def test_a_retry_starts_from_zero_with_bytes_of_its_own(pair: Pair, who: Role) -> None:
    """Blocks of the first attempt are still held while the second one runs."""
    old = pair.flow(3 * WINDOW + 5, seed=1)
    old.to_the_middle()
    old.abort(who)
    for role in BOTH:
        old.wait_end(role)
    new = pair.flow(
        2 * WINDOW + 3,
        attempt=1,
        seed=2,
        late=True,
        transfer_id=old.transfer_id,
        by=old.source,
        to=old.consumer,
    )
    assert new.open_source().available_tokens == 0
    opened = new.open_sink()
    assert (opened.sent_tokens, opened.last_resume_at, opened.base_tokens) == (0, -1, 0)
    stale = [
        old.source.code(worker.Send(**old.named)),
        old.source.code(worker.Ready(**old.named, ready_tokens=WINDOW + BLOCK)),
        old.consumer.code(worker.Receive(**old.named, source=pair.address)),
        old.consumer.code(worker.Resume(**old.named, sent_tokens=WINDOW)),
    ]
    assert stale == ["stale_attempt"] * 4
    new.run()
    for flow in (old, new):  # a release acts on the attempt it names
        for role in BOTH:
            flow.release(role)
    for daemon in pair.daemons:
        daemon.wait_until_free()


def test_blocks_come_to_a_new_owner_without_the_last_ones_bytes(pair: Pair) -> None:
    first = pair.flow(QUOTA, seed=1, whole=QUOTA)
    first.open_source(window_tokens=QUOTA)
    first.open_sink()
    first.run()
    first.release(Role.SINK)
    for daemon in pair.daemons:
        daemon.wait_until_free()
    blocks = range(2 * QUOTA // BLOCK)
    before = {
        Role.SOURCE: [first.source.block(block) for block in blocks],
        Role.SINK: [first.consumer.block(block) for block in blocks],
    }
    second = pair.flow(BLOCK + 5, seed=2, whole=QUOTA, by=first.source, to=first.consumer)
    second.open_source(window_tokens=QUOTA)
    granted = second.wait(Role.SOURCE, lambda seen: seen.allocated_tokens == QUOTA)
    shown = [block for _, block in first.source.window(granted)]
    assert any(any(before[Role.SOURCE][block]) for block in shown)  # they were used
    assert all(not any(first.source.block(block)) for block in shown)
    second.open_sink()
    second.ready(BLOCK)
    arrived = second.wait(Role.SINK, lambda seen: seen.sent_tokens == BLOCK)
    shown = [block for _, block in first.consumer.window(arrived)]
    assert any(any(before[Role.SINK][block]) for block in shown)
    assert all(not any(first.consumer.block(block)) for block in shown[1:])
    end = second.run()
    old = {pieces for block in before[Role.SINK] for pieces in _pieces(block)}
    for _, block in first.consumer.window(end):
        assert old.isdisjoint(_pieces(first.consumer.block(block)))


def _pieces(block: bytes) -> list[bytes]:
    every = [block[at : at + PIECE] for at in range(0, len(block), PIECE)]
    return [piece for piece in every if any(piece)]
