"""Bootstrap rooms: numbers that come back, for transfers whose names must not."""

from typing import Any

import pytest

from kvferry_client.sglang_rooms import (
    FRESH_S,
    KEPT,
    LEFT_S,
    STALL_S,
    Asked,
    Opening,
    RoomBook,
)

ROOM = 7


class World:
    """A book, and a clock. Each request has a name and a prompt, ``prompt`` of ``engine``."""

    def __init__(self) -> None:
        self.book = RoomBook()
        self.now_s = 1000.0

    def open(
        self, request: str, prompt: str = "x", rank: int = 0, room: int = ROOM, **told: Any
    ) -> Opening:
        asked = self._asked("prefill", request, prompt, rank)._replace(source="tcp://a", **told)
        return self.book.open(room, asked, self.now_s)

    def take(
        self,
        request: str,
        prompt: str = "x",
        rank: int = 0,
        engine: str = "d",
        room: int = ROOM,
        **told: Any,
    ) -> Opening | None:
        asked = self._asked(engine, request, prompt, rank)._replace(**told)
        return self.book.take(room, asked, self.now_s)

    def _asked(self, engine: str, request: str, prompt: str, rank: int) -> Asked:
        return Asked(
            engine=engine,
            worker=f"{engine} {rank}",
            call=f"{engine} {rank} {request}",
            request=request,
            identity={"prompt": prompt},
        )


@pytest.fixture
def world() -> World:
    return World()


def test_ranks_that_open_a_room_and_ranks_that_take_it_mean_the_same(world: World) -> None:
    one = world.open("r", rank=0)
    assert world.take("r", rank=0) is one
    assert world.open("r", rank=1) is one
    assert world.take("r", rank=1) is one


def test_a_call_that_is_repeated_changes_nothing(world: World) -> None:
    one = world.open("r")
    assert world.open("r") is one
    assert world.take("r") is one
    world.open("again")
    assert world.take("r") is one


def test_a_room_that_comes_back_has_another_name(world: World) -> None:
    one = world.open("one")
    assert world.take("one") is one
    assert world.take("two") is None
    two = world.open("two")
    assert world.take("two") is two
    assert one.transfer_id != two.transfer_id


def test_another_decode_engine_does_not_get_what_the_first_has(world: World) -> None:
    one = world.open("one")
    assert world.take("one", engine="d") is one
    assert world.take("one", engine="restarted") is None
    two = world.open("two")
    assert world.take("one", engine="restarted") is two


def test_what_decode_never_asked_for_is_not_the_next_requests(world: World) -> None:
    """Decode failed before it could ask, and the router tries again in the same room."""
    world.open("lost")
    second = world.open("second")
    assert world.take("second") is second


def test_what_comes_too_late_for_decode_is_not_the_next_requests(world: World) -> None:
    """Decode's first request waited for it, and asks no more."""
    assert world.take("late", prompt="x") is None
    world.now_s += 2 * FRESH_S
    world.open("late", prompt="x")
    world.now_s += 2 * FRESH_S
    assert world.take("next", prompt="y") is None
    wanted = world.open("next", prompt="y")
    assert world.take("next", prompt="y") is wanted


def test_what_prefill_never_opened_is_not_waited_for_by_the_next_request(world: World) -> None:
    assert world.take("lost") is None
    wanted = world.open("next")
    assert world.take("next") is wanted
    assert world.take("lost") is None


def test_decode_hears_that_prefill_has_given_up(world: World) -> None:
    assert world.take("r") is None
    world.open("r", error="aborted")
    told = world.take("r")
    assert told is not None
    assert told.error == "aborted"


def test_a_decode_that_comes_late_hears_what_prefill_has_just_given_up(world: World) -> None:
    """However long ago it was opened: the request is the same."""
    world.open("r")
    world.now_s += 5 * LEFT_S
    world.open("r", error="aborted")
    world.now_s += LEFT_S / 2
    told = world.take("r")
    assert told is not None
    assert told.error == "aborted"


@pytest.mark.parametrize("was_opened", [True, False])
def test_the_next_request_does_not_hear_it(world: World, was_opened: bool) -> None:
    if was_opened:
        world.open("r")
    world.open("r", error="aborted")
    world.now_s += LEFT_S + 1
    assert world.take("next") is None
    wanted = world.open("next")
    assert world.take("next") is wanted


def test_what_is_declined_is_what_nobody_else_wants(world: World) -> None:
    assert world.take("given up", is_wanted=False) is None
    one, two = world.open("one"), world.open("two")
    assert world.take("given up", is_wanted=False) is None, "somebody may come yet"
    assert world.take("wanted") is two
    world.now_s += LEFT_S
    assert world.take("given up", is_wanted=False) is one


def test_another_prompt_in_the_same_room_is_told_and_not_waited_for(world: World) -> None:
    """Nobody else has come for what was opened when this request was made."""
    wrong = world.open("r", prompt="x")
    assert world.take("r", prompt="y") is None
    world.now_s += LEFT_S
    assert world.take("r", prompt="y") is wrong


def test_two_prompts_at_once_in_one_room_do_not_mix(world: World) -> None:
    x, y = world.open("x", prompt="x"), world.open("y", prompt="y")
    assert world.take("y", prompt="y") is y
    assert world.take("x", prompt="x") is x


def test_what_nobody_fetched_in_time_is_not_the_next_requests(world: World) -> None:
    """The daemon has let go of it. And decode asks before prefill has the first tokens again."""
    world.open("one")
    world.now_s += KEPT * STALL_S
    assert world.take("again") is None
    again = world.open("again")
    assert world.take("again") is again


def test_what_decode_comes_for_in_time_is_still_there(world: World) -> None:
    one = world.open("one")
    world.now_s += KEPT * STALL_S - 1
    assert world.take("one") is one
    world.now_s += KEPT * STALL_S - 1
    assert world.take("one", rank=1) is one, "another rank has just come for it"


def test_a_daemon_that_keeps_less_is_told_of_for_less() -> None:
    world = World()
    world.book = RoomBook(stall_s=STALL_S / 2)
    world.open("one")
    world.now_s += KEPT * STALL_S / 2
    assert world.take("again") is None


def test_what_fails_long_after_it_was_taken_is_not_the_next_requests(world: World) -> None:
    one = world.open("long")
    assert world.take("long") is one
    world.now_s += STALL_S
    assert world.take("next") is None
    world.open("long", error="aborted", was_opened=True)
    assert world.take("next") is None
    wanted = world.open("next")
    assert world.take("next") is wanted


def test_a_room_in_steady_use_keeps_what_is_new(world: World) -> None:
    """As of a client that names the same one in all of its requests."""
    for n in range(1000):
        world.now_s += 1
        one = world.open(f"{n}")
        assert world.take(f"{n}") is one
        assert world.take(f"lost {n}", prompt="y") is None
    assert world.book.uses <= 3 * KEPT * STALL_S


def test_rooms_are_forgotten_after_a_while(world: World) -> None:
    rooms = range(5)
    for room in rooms:
        world.now_s += 1
        world.open(f"{room}", room=room)
    world.now_s += KEPT * STALL_S - 2.5
    world.take("other", room=9)
    assert world.book.uses == 4
    assert [bool(world.take("r", room=room)) for room in rooms] == [False] * 2 + [True] * 3
