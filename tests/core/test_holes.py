"""The holes of the plain rule: one scenario each, which ours passes and the plain rule fails.

Ranks of one group are two transfers here, as the plain rule has them; ours of one transfer are in
test_groups.py.
"""

from collections.abc import Callable
from typing import Any, Protocol

import pytest

from core.plain import PlainRig
from core.stories import Story
from kvferry_proto.states import State
from world import BLOCK, Letter, World

WINDOW = 8
TOTAL = 4 * WINDOW


class Rig(Protocol):
    """A transfer that a scenario can drive, by whatever rule."""

    read: list[Any]
    attempt: int

    @property
    def sent_tokens(self) -> int: ...
    @property
    def total_told(self) -> int | None: ...
    @property
    def ended(self) -> bool: ...
    @property
    def requests(self) -> int: ...
    @property
    def landed(self) -> object: ...
    def land(self) -> None: ...
    def take(self) -> None: ...
    def resume(self) -> None: ...
    def double(self) -> None: ...
    def lose(self) -> None: ...
    def wait(self) -> None: ...
    def end_payload(self) -> None: ...
    def retry(self) -> None: ...
    def twin(self) -> "Rig": ...
    def resume_at(self, tokens: int) -> None: ...


class OurRig:
    """The daemons' own core, with a sink pool that is just one window large."""

    def __init__(self) -> None:
        self.story = Story(TOTAL, World(blocks=2 * WINDOW // BLOCK, window_tokens=WINDOW))
        self.story.open()
        self.story.world.wait(0.02)
        self.attempt = 0
        self.read: list[Any] = []

    @property
    def sent_tokens(self) -> int:
        return self.story.sink().sent_tokens

    @property
    def total_told(self) -> int | None:
        return self.story.sink().total_tokens

    @property
    def ended(self) -> bool:
        return self.story.sink().state is State.SUCCESS

    @property
    def requests(self) -> int:
        return sum(isinstance(thing, Letter) for thing in self.story.world.wire)

    @property
    def landed(self) -> object:
        return self.sent_tokens

    def land(self) -> None:
        self.story.produce()
        self.story.world.wait(0.02)

    def take(self) -> None:
        seen = self.story.sink()
        self.story.read.clear()
        self.story.take(seen)
        self.read += [(attempt, token) for _, attempt, token in self.story.read]
        self.story.resume(seen.sent_tokens)

    def resume(self) -> None:
        self.story.resume(self.sent_tokens)

    def double(self) -> None:
        """Everything under way arrives twice, and the worker says its resume twice."""
        self.story.produce()
        self.story.world.deliver(keep=True)
        self.resume()

    def lose(self) -> None:
        self.story.produce()
        self.story.world.wire.clear()

    def wait(self) -> None:
        self.story.world.wait(2.5)
        self.story.world.beat()

    def end_payload(self) -> None:
        ready = self.story.source().available_tokens
        self.story.ready(ready, ready)
        self.story.world.wait(0.02)

    def retry(self) -> None:
        self.story.release()
        self.attempt += 1
        self.story.attempt += 1
        self.story.open()

    def twin(self) -> "OurRig":
        return OurRig()

    def resume_at(self, tokens: int) -> None:
        self.story.resume(tokens)


def stale_contents_of_a_reused_block(rig: Rig) -> None:
    rig.land()
    rig.take()
    assert rig.sent_tokens == WINDOW  # the blocks still hold the first window; nothing has landed


def a_lost_resume(rig: Rig) -> None:
    rig.land()
    rig.take()
    rig.lose()
    rig.resume()
    rig.wait()
    rig.land()
    assert rig.sent_tokens == 2 * WINDOW


def a_doubled_resume(rig: Rig) -> None:
    rig.land()
    rig.take()
    rig.double()
    rig.land()
    rig.take()
    assert rig.read == [(0, token) for token in range(2 * WINDOW)]


def a_window_that_brings_0_tokens(rig: Rig) -> None:
    rig.land()
    rig.take()
    rig.end_payload()
    rig.land()
    assert rig.ended


def a_resume_storm_at_0(rig: Rig) -> None:
    before = rig.requests
    for _ in range(50):
        rig.resume()
    assert rig.requests <= before + 1


def a_retry_that_inherits_progress(rig: Rig) -> None:
    rig.land()
    rig.take()
    rig.retry()
    rig.read.clear()
    assert rig.sent_tokens == 0
    rig.wait()
    rig.land()
    rig.take()
    assert rig.read == [(1, token) for token in range(WINDOW)]


def a_total_read_from_a_block(rig: Rig) -> None:
    rig.land()
    assert rig.total_told is None  # nobody has told it, whatever the blocks hold


def second_window_taken_for_the_first(rig: Rig) -> None:
    rig.land()
    first = rig.landed
    rig.take()
    rig.land()
    assert rig.landed != first


def ranks_of_one_group_that_disagree(rig: Rig) -> None:
    """One rank has its window, the other none; the step of the first is told to both."""
    other = rig.twin()
    rig.land()
    rig.take()
    other.resume_at(WINDOW)
    assert other.sent_tokens == 0
    for _ in range(2):
        other.land()
        other.take()
    assert other.read == [(0, token) for token in range(2 * WINDOW)]


HOLES: list[Callable[[Rig], None]] = [
    stale_contents_of_a_reused_block,
    a_lost_resume,
    a_doubled_resume,
    a_window_that_brings_0_tokens,
    a_resume_storm_at_0,
    a_retry_that_inherits_progress,
    a_total_read_from_a_block,
    second_window_taken_for_the_first,
    ranks_of_one_group_that_disagree,
]
by_name = pytest.mark.parametrize("hole", HOLES, ids=lambda hole: hole.__name__)


@by_name
def test_ours_does_not_fall_into(hole: Callable[[Rig], None]) -> None:
    hole(OurRig())


@by_name
def test_the_plain_rule_falls_into(hole: Callable[[Rig], None]) -> None:
    reuses = hole is stale_contents_of_a_reused_block
    with pytest.raises(AssertionError):
        hole(PlainRig(WINDOW, TOTAL, reuses_blocks=reuses))
