"""What a bootstrap room means: how decode learns what its transfer is called, and where its source is.

A room is a number that a router gives to both engines. It may come back, in a retry or after a
retraction, but a transfer's name must not: so each opening of a room gets a name of its own. A
``RoomBook`` in prefill's bootstrap server keeps them; engines ask it through ``Rooms``. Neither
side need come: what one side has given up, or only one was ever asked, must not be taken for
another request's. So requests meet by room and prompt, and not by counting. Imports nothing of
SGLang.
"""

import secrets
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from kvferry_client.model_identity import PROMPT

STALL_S = 60.0  # a daemon's default: it lets go of what nobody has fetched for so long
KEPT = 0.8  # of that: what is told of is there to be fetched, and no name of what is not is given
LEFT_S = 2.0  # an opening that nobody has come for may be another request's, or unwanted
FRESH_S = 10.0  # a router asks both engines at once: what was opened longer before is not meant


class Asked(NamedTuple):
    """What a worker asks of one room."""

    engine: str  # the same for all ranks
    worker: str
    call: str  # the same when it is repeated
    request: str  # the engine's name of it, the same for all ranks
    identity: dict[str, str]  # the model and the prompt
    source: str = ""
    error: str | None = None  # prefill: why there will be no payload
    is_wanted: bool = True  # decode: False if it is to be declined
    was_opened: bool = False  # prefill: it has the opening's name already


@dataclass
class _Use:
    """A request that an engine has in a room. Its ranks come for it one after the other."""

    engine: str
    request: str
    identity: dict[str, str]
    since_s: float
    calls: dict[str, str] = field(default_factory=dict)  # by worker
    used_s: float = field(init=False)  # kept for a while from then on

    def __post_init__(self) -> None:
        self.used_s = self.since_s

    @property
    def prompt(self) -> str:
        """What tells it from other requests in its room."""
        return self.identity.get(PROMPT, "")

    def is_of(self, asked: Asked) -> bool:
        """Whether this is what a worker asks for; it is from now on."""
        if (self.engine, self.request) != (asked.engine, asked.request):
            return False
        return self.calls.setdefault(asked.worker, asked.call) == asked.call


@dataclass
class Opening(_Use):
    """Prefill's half of a use of a room."""

    transfer_id: str = ""
    source: str = ""
    error: str | None = None
    error_s: float = 0.0  # when it was told
    is_taken: bool = False


@dataclass
class _Claim(_Use):
    """Decode's half."""

    opening: Opening | None = None


@dataclass
class _Room:
    used_s: float
    openings: list[Opening] = field(default_factory=list)
    claims: list[_Claim] = field(default_factory=list)


class RoomBook:
    """The rooms of one prefill engine."""

    def __init__(self, stall_s: float = STALL_S) -> None:
        """``stall_s``: of prefill's daemon."""
        self._kept_s = KEPT * stall_s
        self._rooms: dict[int, _Room] = {}  # in the order of their newest use

    @property
    def uses(self) -> int:
        """How many openings and claims there are, of all rooms."""
        return sum(len(one.openings) + len(one.claims) for one in self._rooms.values())

    def open(self, room: int, asked: Asked, now_s: float) -> Opening:
        """A worker of prefill's has a request's first tokens, or will never have them."""
        self._forget(now_s)
        uses = self._room(room, now_s).openings
        opening = next((one for one in uses if one.is_of(asked)), None)
        if opening is None:
            opening = Opening(
                asked.engine,
                asked.request,
                asked.identity,
                now_s,
                {asked.worker: asked.call},
                transfer_id=f"sglang-{room:x}-{secrets.token_hex(8)}",
                source=asked.source,
            )
            if not asked.was_opened:  # else it was let go of, and its request is long gone
                uses.append(opening)
        if asked.error is not None and opening.error is None:
            opening.error, opening.error_s, opening.used_s = asked.error, now_s, now_s
        return opening

    def take(self, room: int, asked: Asked, now_s: float) -> Opening | None:
        """A worker of decode's has a request; None while prefill has not opened it."""
        self._forget(now_s)
        uses = self._room(room, now_s).claims
        claim = next((one for one in uses if one.is_of(asked)), None)
        if claim is None:
            calls = {asked.worker: asked.call}
            claim = _Claim(asked.engine, asked.request, asked.identity, now_s, calls)
            uses.append(claim)
        claim.used_s = now_s
        if claim.opening is None:
            openings = [one for one in self._rooms[room].openings if not one.is_taken]
            claim.opening = _meant(openings, claim, now_s, is_wanted=asked.is_wanted)
            if claim.opening is not None:
                claim.opening.is_taken, claim.opening.used_s = True, now_s
        return claim.opening

    def answer(self, asked: dict[str, Any], now_s: float) -> dict[str, Any]:
        """What ``Rooms`` asks, several rooms at once: by call, those that are known."""
        known = {}
        for call, about in asked["rooms"].items():
            try:
                found = self._answer(asked, str(call), about, now_s)
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # it fails alone
                why = f"not a question for rooms: {error!r}"
                found = Opening("", "", {}, now_s, error=why)
            if found is not None:
                known[call] = {
                    "transfer_id": found.transfer_id,
                    "source": found.source,
                    "identity": found.identity,
                    "error": found.error,
                }
        return known

    def _answer(
        self, asked: dict[str, Any], call: str, about: dict[str, Any], now_s: float
    ) -> Opening | None:
        error = about.get("error")
        use = Asked(
            engine=str(asked["engine"]),
            worker=str(asked["worker"]),
            call=call,
            request=str(about["request"]),
            identity={str(name): str(one) for name, one in about["identity"].items()},
            source=str(asked["source"]),
            error=None if error is None else str(error),
            is_wanted=bool(about["is_wanted"]),
            was_opened=bool(about.get("was_opened")),
        )
        come = self.open if asked["verb"] == "open" else self.take
        return come(int(about["room"]), use, now_s)

    def _room(self, room: int, now_s: float) -> _Room:
        """One that is used now, without those of its uses that are past."""
        one = self._rooms.pop(room) if room in self._rooms else _Room(now_s)
        self._rooms[room] = one  # behind the others: they are forgotten in the order of use
        one.used_s = now_s
        past_s = now_s - self._kept_s
        one.openings[:] = [use for use in one.openings if use.used_s > past_s]
        one.claims[:] = [use for use in one.claims if use.used_s > past_s]
        return one

    def _forget(self, now_s: float) -> None:
        """Let go of rooms all of whose uses are past."""
        rooms, past_s = self._rooms, now_s - self._kept_s
        for room in [*takewhile(lambda one: rooms[one].used_s <= past_s, rooms)]:
            del rooms[room]


def _meant(
    openings: list[Opening], claim: _Claim, now_s: float, *, is_wanted: bool
) -> Opening | None:
    """Which of the openings that nobody has taken is a request's, if any."""
    alike = [one for one in openings if one.prompt == claim.prompt]
    left = [
        one
        for one in openings
        if one.since_s <= now_s - LEFT_S and one.since_s >= claim.since_s - FRESH_S
    ]
    if not is_wanted:  # somebody else may want it, in the same room: he comes first
        return next((one for one in left if one in alike), None)
    for one in reversed(alike):  # the newest: who wanted the others is gone
        if one.error is None:
            return one
    for one in reversed(alike):
        if claim.since_s <= one.error_s + LEFT_S:
            return one
    others = [one for one in left if one not in alike and one.error is None]
    return others[-1] if others else None
