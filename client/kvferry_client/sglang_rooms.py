"""How decode learns what a bootstrap room's transfer is called, and where its source is.

A room is a number that a router gives to both engines. It may come back, in a retry or after a
retraction, but a transfer's name must not: so each opening of a room gets a name of its own. A
``RoomBook`` in prefill's bootstrap server keeps them; engines ask it through ``Rooms``, in threads
of their own. Imports nothing of SGLang.
"""

import json
import secrets
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

ASK_AGAIN_S = (0.02, 0.2)  # doubling from the one to the other while nothing is new
CALL_S = 5.0
UNREACHABLE_S = 10.0  # a bootstrap server that does not answer for so long is given up
KEPT_S = 600.0
Verb = Literal["open", "take"]


@dataclass
class Opening:
    """One use of a room."""

    transfer_id: str
    source: str
    opened_s: float
    opened_by: dict[str, str] = field(default_factory=dict)  # which call of a worker's it was
    taken_by: dict[str, str] = field(default_factory=dict)


class RoomBook:
    """The rooms of one prefill engine.

    Its ranks open a room one after the other, and so do decode's ranks take it: the n-th time that
    a worker comes for a room means the room's n-th use. A call may be repeated by its number.
    """

    def __init__(self) -> None:
        self._rooms: dict[int, list[Opening]] = {}  # in the order of their newest opening

    def open(self, room: int, worker: str, call: str, source: str, now_s: float) -> Opening:
        """A worker of prefill's has the room's next request."""
        self._forget(now_s)
        openings = self._rooms.pop(room, [])
        self._rooms[room] = openings
        for opening in openings:
            if opening.opened_by.setdefault(worker, call) == call:
                return opening
        name = f"sglang-{room:x}-{secrets.token_hex(8)}"
        openings.append(Opening(name, source, now_s, {worker: call}))
        return openings[-1]

    def take(self, room: int, worker: str, call: str) -> Opening | None:
        """A worker of decode's wants the room's next request; None while it has not been opened."""
        for opening in self._rooms.get(room, ()):
            if opening.taken_by.setdefault(worker, call) == call:
                return opening
        return None

    def _forget(self, now_s: float) -> None:
        """Let go of rooms that were opened long ago."""
        old = takewhile(
            lambda room: self._rooms[room][-1].opened_s <= now_s - KEPT_S, list(self._rooms)
        )
        for room in old:
            del self._rooms[room]

    def answer(self, asked: dict[str, Any], now_s: float) -> dict[str, Any]:
        """What ``Rooms`` asks, several rooms at once: by call, those that are known."""
        known = {}
        worker = str(asked["worker"])
        for call, room in asked["rooms"].items():
            if asked["verb"] == "open":
                found: Opening | None = self.open(
                    int(room), worker, call, str(asked["source"]), now_s
                )
            else:
                found = self.take(int(room), worker, call)
            if found is not None:
                known[call] = {"transfer_id": found.transfer_id, "source": found.source}
        return known


class Ticket:
    """One room that an engine waits for."""

    def __init__(self, room: int, wait_s: float) -> None:
        self.room = room
        self.call = secrets.token_hex(8)
        self.until_s = time.monotonic() + wait_s
        self.transfer_id: str | None = None
        self.source = ""
        self.error: str | None = None  # once nobody asks any more
        self._is_wanted = True
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the answer is still to come."""
        return self.transfer_id is None and self.error is None

    def found(self, transfer_id: str, source: str) -> bool:
        """The answer; whether anybody still wants it."""
        with self._lock:
            self.source, self.transfer_id = source, transfer_id
            return self._is_wanted

    def give_up(self) -> bool:
        """Nobody wants it any more; whether the answer is here, so that its source can be told.

        Else it is asked for all the same, or another request in this room would be taken for it.
        """
        with self._lock:
            self._is_wanted = False
            return self.transfer_id is not None


class Rooms:
    """Asks bootstrap servers for rooms. A thread for each server, while there is something to ask."""

    def __init__(self, verb: Verb, wait_s: float, unwanted: Callable[[Ticket], object]) -> None:
        """``wait_s``: how long a room may stay unknown. ``unwanted``: told of rooms that come late."""
        self.source = ""  # the daemon's address, which those who open rooms give
        self._verb = verb
        self._wait_s = wait_s
        self._unwanted = unwanted
        self._worker = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Ticket]] = {}

    def ask(self, server: str, room: int) -> Ticket:
        """Begin to ask ``server``, "host:port", for a room."""
        ticket = Ticket(room, self._wait_s)
        with self._lock:
            tickets = self._waiting.setdefault(server, [])
            tickets.append(ticket)
            if len(tickets) == 1:
                args = (server, tickets)
                threading.Thread(
                    target=self._serve, args=args, name="kvferry-rooms", daemon=True
                ).start()
        return ticket

    def _serve(self, server: str, tickets: list[Ticket]) -> None:
        answered_s, pause_s = time.monotonic(), ASK_AGAIN_S[0]
        while True:
            with self._lock:
                tickets[:] = [one for one in tickets if one.is_open]
                if not tickets:
                    del self._waiting[server]
                    return
                asked = list(tickets)
            trouble = self._ask(server, asked)
            now_s = time.monotonic()
            answered_s = now_s if trouble is None else answered_s
            for ticket in asked:
                if trouble is not None and now_s - answered_s > UNREACHABLE_S:
                    ticket.error = f"prefill's bootstrap server at {server} is gone: {trouble}"
                elif ticket.is_open and now_s > ticket.until_s:
                    ticket.error = f"room {ticket.room} was not opened for {self._wait_s:g} s"
            is_news = any(not one.is_open for one in asked)
            pause_s = ASK_AGAIN_S[0] if is_news else min(2 * pause_s, ASK_AGAIN_S[1])
            time.sleep(pause_s)

    def _ask(self, server: str, tickets: list[Ticket]) -> str | None:
        """One call; what was in the way of it."""
        body = {
            "verb": self._verb,
            "worker": self._worker,
            "source": self.source,
            "rooms": {one.call: one.room for one in tickets},
        }
        request = urllib.request.Request(
            f"http://{server}/kvferry/rooms",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=CALL_S) as answer:
                known = json.load(answer)
        except (OSError, ValueError) as error:
            return str(error)
        for ticket in tickets:
            if ticket.call in known and not ticket.found(**known[ticket.call]):
                self._unwanted(ticket)
        return None
