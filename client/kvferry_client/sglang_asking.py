"""An engine's questions for bootstrap rooms: see ``sglang_rooms``. Imports nothing of SGLang."""

import http.client
import json
import logging
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Literal

from kvferry_proto.errors import Code, FerryError

ASK_AGAIN_S = (0.02, 0.2)  # doubling from the one to the other while nothing is new
CALL_S = 5.0
UNREACHABLE_S = 10.0  # a bootstrap server that does not answer for so long is given up
AT_ONCE = 256  # rooms in one call: the server takes 1 MiB, some 3,400 of them
Verb = Literal["open", "take"]
logger = logging.getLogger("sglang.kvferry")


class Ticket:
    """One request that an engine has in a room, and what is known of it."""

    def __init__(
        self,
        room: int,
        request: str,
        identity: Mapping[str, str],
        wait_s: float,
        call: str | None = None,
    ) -> None:
        self.room = room
        self.request = request
        self.identity = identity
        self.call = call or secrets.token_hex(8)
        self.heard_s = time.monotonic()  # when its server last answered
        self.until_s = self.heard_s + wait_s
        self.transfer_id: str | None = None
        self.source = ""
        self.error: str | None = None  # once nobody asks any more
        self.reason: str | None = None  # why prefill will send nothing
        self.was_opened = False  # by a ticket before this one
        self._is_wanted = True
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the answer is still to come."""
        return self.transfer_id is None and self.error is None

    def question(self) -> dict[str, object]:
        """What is asked of the book."""
        return {
            "room": self.room,
            "request": self.request,
            "identity": dict(self.identity),
            "is_wanted": self._is_wanted,
            "was_opened": self.was_opened,
            "error": self.reason,
        }

    def found(
        self, transfer_id: str, source: str, identity: Mapping[str, str], error: str | None
    ) -> bool:
        """The answer; whether its payload, if there is one, is still wanted."""
        with self._lock:
            if error is not None and error != self.reason:
                self.error = f"prefill has given it up: {error}"
                return True
            self.error = self._mismatch(transfer_id, identity)
            self.source, self.transfer_id = source, transfer_id
            return self._is_wanted and self.error is None

    def give_up(self) -> bool:
        """Nobody wants it any more; whether the answer is here, so that the other side can be told.

        Else it is asked for all the same, so that it can be told later.
        """
        with self._lock:
            self._is_wanted = False
            return self.transfer_id is not None and self.error is None

    def _mismatch(self, transfer_id: str, told: Mapping[str, str]) -> str | None:
        """What differs, if anything does: nothing is fetched then."""
        for name, here in self.identity.items():
            if told.get(name) != here:
                words = f"{transfer_id}: {name}: {told.get(name)} at the source, {here} here"
                return str(FerryError(Code.PAYLOAD_MISMATCH, words))
        return None


class Rooms:
    """Asks bootstrap servers for rooms. A thread for each server, while there is something to ask."""

    def __init__(self, verb: Verb, wait_s: float, unwanted: Callable[[Ticket], object]) -> None:
        """``wait_s``: how long a room may stay unknown. ``unwanted``: told of rooms that come late."""
        self.source = ""  # the daemon's address, which those who open rooms give
        self._verb = verb
        self._wait_s = wait_s
        self._unwanted = unwanted
        self._worker = secrets.token_hex(8)
        self.engine = self._worker  # the same for all ranks, if there are others
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Ticket]] = {}

    def ask(
        self,
        server: str,
        room: int,
        request: str,
        identity: Mapping[str, str],
        *,
        wanted: bool = True,
    ) -> Ticket:
        """Begin to ask ``server``, "host:port", for a room; not ``wanted`` if it is to be declined."""
        ticket = Ticket(room, request, identity, self._wait_s)
        if not wanted:
            ticket.give_up()
        self._begin(server, ticket)
        return ticket

    def withdraw(self, server: str, ticket: Ticket, reason: str) -> Ticket:
        """Tell decode, if it comes, that what was or would have been opened will not be sent."""
        again = Ticket(ticket.room, ticket.request, ticket.identity, self._wait_s, ticket.call)
        again.was_opened = ticket.transfer_id is not None
        ticket.reason = again.reason = reason
        self._begin(server, again)
        return again

    def _begin(self, server: str, ticket: Ticket) -> None:
        with self._lock:
            tickets = self._waiting.setdefault(server, [])
            tickets.append(ticket)
            if len(tickets) == 1:
                args = (server, tickets)
                threading.Thread(
                    target=self._serve, args=args, name="kvferry-rooms", daemon=True
                ).start()

    def _serve(self, server: str, tickets: list[Ticket]) -> None:
        pause_s = ASK_AGAIN_S[0]
        while True:
            with self._lock:
                tickets[:] = [one for one in tickets if one.is_open]
                if not tickets:
                    del self._waiting[server]
                    return
                asked = list(tickets)
            self._ask_all(server, asked)
            is_news = any(not one.is_open for one in asked)
            pause_s = ASK_AGAIN_S[0] if is_news else min(2 * pause_s, ASK_AGAIN_S[1])
            time.sleep(pause_s)

    def _ask_all(self, server: str, asked: list[Ticket]) -> None:
        """Some at a time. Where nobody is there the others need not try as well, and wait for it."""
        trouble: str | None = None
        is_there = True
        for first in range(0, len(asked), AT_ONCE):
            some = asked[first : first + AT_ONCE]
            if is_there:
                trouble, is_there = self._try(server, some)
            self._note(server, some, trouble)

    def _try(self, server: str, tickets: list[Ticket]) -> tuple[str | None, bool]:
        """One call: what was in the way of it, and whether anybody is there."""
        try:
            self._ask(server, tickets)
        except (urllib.error.HTTPError, http.client.HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {error}", True
        except OSError as error:
            return str(error), False
        except Exception as error:  # of any kind: no other thread would ask for these
            logger.warning("what %s says of rooms is of no use", server, exc_info=True)
            return f"{type(error).__name__}: {error}", True
        return None, True

    def _note(self, server: str, asked: list[Ticket], trouble: str | None) -> None:
        """They were asked for: give up those for which it was in vain for too long."""
        now_s = time.monotonic()
        for ticket in asked:
            ticket.heard_s = now_s if trouble is None else ticket.heard_s
            if not ticket.is_open:
                continue
            if now_s - ticket.heard_s > UNREACHABLE_S:
                ticket.error = f"prefill's bootstrap server at {server} gave no answer: {trouble}"
            elif now_s > ticket.until_s:
                ticket.error = f"room {ticket.room} was not opened for {self._wait_s:g} s"

    def _ask(self, server: str, tickets: list[Ticket]) -> None:
        """One call."""
        body = {
            "verb": self._verb,
            "engine": self.engine,
            "worker": self._worker,
            "source": self.source,
            "rooms": {one.call: one.question() for one in tickets},
        }
        request = urllib.request.Request(
            f"http://{server}/kvferry/rooms",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=CALL_S) as answer:
            known = json.load(answer)
        for ticket in tickets:
            if ticket.call in known and not ticket.found(**known[ticket.call]):
                self._unwanted(ticket)
