"""Polls that wait: found by what changes, and bounded by what they wait for."""

import pytest

from kvferry_daemon.core import node
from kvferry_daemon.core.events import Key
from kvferry_daemon.core.polls import WATCHED_MAX, WATCHED_OF_ONE_MAX, Polls, WaitingPoll
from kvferry_proto.errors import AGAIN_S, Code, FerryError
from kvferry_proto.states import Role
from kvferry_proto.worker import POLL_MAX, Poll, Ready, Send, Watched
from world import World, layout

AFTER = {(Key(Role.SINK, f"t{number}", 0), 0): 5 for number in range(POLL_MAX)}
KEY = Key(Role.SINK, "t0", 0)


def a_poll(session: str = "one", watched: int = POLL_MAX) -> WaitingPoll:
    return WaitingPoll(session, b"route", 1, dict(list(AFTER.items())[:watched]), 60.0)


def fill(polls: Polls, session: str = "one") -> list[int]:
    """As many of the largest polls as one worker may have."""
    return [polls.add(a_poll(session)) for _ in range(WATCHED_OF_ONE_MAX // POLL_MAX)]


def test_what_one_worker_waits_for_is_bounded() -> None:
    polls = Polls()
    fill(polls)
    with pytest.raises(FerryError, match="this worker's polls") as caught:
        polls.add(a_poll(watched=1))
    assert (caught.value.code, caught.value.retry_after_s) == (Code.RESOURCE_EXHAUSTED, AGAIN_S)
    polls.add(a_poll("other"))


def test_what_all_wait_for_is_bounded() -> None:
    polls = Polls()
    for session in range(WATCHED_MAX // WATCHED_OF_ONE_MAX):
        fill(polls, f"{session}")
    with pytest.raises(FerryError, match="at most"):
        polls.add(a_poll("late", watched=1))


def test_those_that_are_answered_make_room() -> None:
    polls = Polls()
    numbers = fill(polls)
    assert [number for number, _ in polls.take_changed(KEY, 6)] == numbers
    for number in fill(polls):
        assert polls.take_expired(number, 59.0) is None
        assert polls.take_expired(number, 60.0) is not None
    fill(polls)
    assert len(polls) == len(numbers)


def test_one_turn_answers_so_much_and_lets_the_others_ask_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    aux: dict[str, int | float | str | bytes] = {"big": bytes(1 << 16)}
    monkeypatch.setattr(node, "ANSWERS_A_TURN_BYTES", 4 << 16)
    world.hello("a", b"w", layout(aux=("big",)))
    opened = world.call("a", b"w", Send(transfer_id="t")).transfers[0]
    seen = world.snapshot("a", b"w", Role.SOURCE)
    assert opened.aux is None
    watched = Watched(role=Role.SOURCE, transfer_id="t", after=seen.snapshot)
    for number in range(6):
        assert world.call("a", b"w", Poll(call=number, transfers=[watched], wait_s=9)) is None
    last = world.call("a", b"w", Ready(call=9, transfer_id="t", ready_tokens=0, aux=aux))
    _, *answers = *world.machines["a"].inbox[b"w"], last  # the first one is the call's own
    assert [(reply.call, len(reply.transfers)) for reply in answers] == [
        (number, int(number < 4)) for number in range(6)
    ]
    assert answers[0].transfers[0].aux == aux
