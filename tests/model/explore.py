"""Walks through every state that can be reached, and looks whether each can still come to an end."""

from dataclasses import dataclass

from model.rules import is_over, wrong, wrong_step
from model.state import Setup, State, first_state
from model.steps import steps

STATES_MAX = 2_000_000


@dataclass(frozen=True)
class Found:
    """What a walk came to: ``problem`` is None, or a rule that was broken with its story."""

    states: int
    problem: str | None
    story: tuple[str, ...] = ()


def explore(setup: Setup) -> Found:
    """Breadth first, so that the story of a problem is the shortest."""
    start = first_state(setup)
    number: dict[State, int] = {start: 0}
    came: list[tuple[int, str]] = [(-1, "start")]
    into: list[list[int]] = [[]]
    over: list[int] = []
    level = [start]
    while level:
        below: list[State] = []
        for state in level:
            at = number[state]
            if is_over(state):
                over.append(at)
            for label, after in steps(state, setup):
                to = number.get(after)
                if to is None:
                    to = number[after] = len(came)
                    came.append((at, label))
                    into.append([])
                    below.append(after)
                    problem = wrong(after, setup)
                    if problem is not None:
                        return Found(len(came), problem, _story(came, to))
                    assert len(came) <= STATES_MAX, "too large a setup"
                into[to].append(at)
                problem = wrong_step(state, after)
                if problem is not None:
                    return Found(len(came), problem, (*_story(came, at), label))
        level = below
    stuck = _stuck(into, over)
    if stuck is not None:
        return Found(len(came), "stuck: from here it can never end", _story(came, stuck))
    return Found(len(came), None)


def _stuck(into: list[list[int]], over: list[int]) -> int | None:
    """The first state from which no end can be reached."""
    ends = bytearray(len(into))
    todo = list(over)
    for at in todo:
        ends[at] = 1
    while todo:
        for before in into[todo.pop()]:
            if not ends[before]:
                ends[before] = 1
                todo.append(before)
    at = ends.find(0)
    return None if at < 0 else at


def _story(came: list[tuple[int, str]], at: int) -> tuple[str, ...]:
    labels: list[str] = []
    while at >= 0:
        at, label = came[at]
        labels.append(label)
    return tuple(reversed(labels))
