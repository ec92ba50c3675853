"""Rates of the last ten seconds, from sums that somebody else keeps."""

import pytest

from kvferry_daemon.lately import Lately
from kvferry_proto.control import RateStatus
from kvferry_proto.states import Role
from world import World


def rates(lately: Lately, now_s: float) -> RateStatus:
    """The rates, which there are."""
    told = lately.rates(now_s)
    assert told is not None
    return told


def test_rates_are_of_the_last_ten_seconds_only() -> None:
    node = World().machines["a"].node
    lately = Lately(node)
    assert lately.rates(0.0) is None
    for second in range(61):
        lately.look(float(second))
        if second < 30:
            node.meters.moved_tokens[Role.SINK] += 100
            node.counters["bytes_received"] += 6400
        if second == 5:
            assert rates(lately, 6.0) == RateStatus(
                seconds=6.0, tokens_sent=0.0, tokens_received=100.0, bytes_sent=0.0,
                bytes_received=6400.0, bytes_copied=0.0,
            )  # fmt: skip
        if second == 29:
            assert rates(lately, 29.5).tokens_received == pytest.approx(100, rel=0.06)
    still = rates(lately, 60.5)
    assert still.seconds == pytest.approx(10.5)
    assert (still.tokens_received, still.bytes_received) == (0.0, 0.0)


def test_looks_are_bounded_however_short_a_heartbeat_is() -> None:
    lately = Lately(World().machines["a"].node)
    for number in range(100_000):
        lately.look(number / 1000)
    assert 10.0 <= rates(lately, 100.0).seconds <= 11.0
    assert len(lately._looks) <= 22
