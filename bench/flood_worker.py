"""One worker of the flood: `python -m bench.flood_worker`, a process with one connection.

It builds its frames by hand and reads the answers as plain maps, since the clients share the cores
with what is measured. It never repeats a call: each must be answered exactly once.

libzmq drops what a ROUTER sends to a reader that is too slow, once 1000 messages wait; so calls
are sent against credit, of which there is a quarter of that.
"""

import itertools
import json
import math
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from bench.wire import Wire
from kvferry_proto.layout import Dtype, Layout, Plane

BLOCK_TOKENS = 16
LAYOUT = Layout(planes=(Plane(name="token", dtype=Dtype.INT64),), block_size_tokens=BLOCK_TOKENS)
CREDIT = 256  # calls under way, polls that wait not counted
WAITING_MAX = 32
BATCH_CALLS = 8
ANSWER_S = 20.0  # for the last answers, when nothing more is sent
STEP = 1.02  # of the latencies' histogram
# What the traffic is made of. A move is a ready or a resume; where none is due, a poll.
MIX = (
    *("move", "poll", "poll", "poll", "wait", "poll", "poll", "beat"),
    *("move", "poll", "poll", "poll", "wait", "poll", "poll", "batch"),
)
FAILED, SUCCESS = 0, 4
VIOLATIONS_MAX = 20


class Side:
    """One transfer as this worker has seen it last."""

    def __init__(self, number: int, role: str) -> None:
        self.number = number
        self.name = {"role": role, "transfer_id": f"flood-{number}", "attempt": 0}
        self.seen: dict[str, Any] = {"snapshot": -1, "sent_tokens": 0, "runs": []}
        self.is_busy = False
        self.is_queued = False
        self.released = False

    def block_of(self, token: int) -> int:
        """The block of the window that holds a token."""
        index = (token - self.seen["base_tokens"]) // BLOCK_TOKENS
        for first, count in self.seen["runs"]:
            if index < count:
                return int(first + index)
            index -= count
        raise AssertionError(f"token {token} is not in the window: {self.seen}")

    def content(self, token: int) -> np.ndarray[Any, Any]:
        """What the block that starts at a token holds."""
        return np.arange(token, token + BLOCK_TOKENS, dtype=np.int64) + (self.number << 32)


class Flood:
    """Sends calls at a rate and looks at every answer."""

    def __init__(self, directory: Path, role: str, source: str | None) -> None:
        self.role = role
        self.source = source
        wire = Wire(directory, LAYOUT)
        self.socket = wire.socket
        self.numbers = itertools.count(1)
        self.under_way: dict[int, tuple[str, float, list[Side]]] = {}
        self.waiting = 0  # polls that the daemon lets wait
        self.sides: list[Side] = []
        self.by_id: dict[str, Side] = {}
        self.movable: deque[Side] = deque()
        self.latencies: Counter[int] = Counter()
        self.answered: Counter[str] = Counter()
        self.violations: list[str] = []
        self.ending = False
        self.blocks = wire.blocks().view(np.int64)

    # --- calls and answers ---

    def violation(self, words: str) -> None:
        """Something that must not be."""
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(words[:400])

    def call(self, kind: str, sides: list[Side], /, **fields: object) -> None:
        """Send one call; ``kind`` is its line in the result."""
        number = next(self.numbers)
        for side in sides:
            side.is_busy = True
        self.waiting += kind == "wait"
        self.under_way[number] = (kind, time.perf_counter(), sides)
        self.socket.send(msgpack.packb({"call": number, **fields}))

    def read(self) -> None:
        """Take in every answer that is there."""
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            answer = msgpack.unpackb(frame)
            begun = self.under_way.pop(answer.get("call", 0), None)
            if begun is None:
                self.violation(f"an answer to no call of ours, or a second one: {answer}")
                continue
            kind, sent_s, sides = begun
            for side in sides:
                side.is_busy = False
            self.answered[kind] += 1
            if kind == "wait":
                self.waiting -= 1
            else:
                taken_us = (time.perf_counter() - sent_s) * 1e6
                self.latencies[int(math.log(taken_us) / math.log(STEP))] += 1
            for one in answer.get("replies", [answer]):
                self.note(kind, sides, one)

    def note(self, kind: str, sides: list[Side], answer: dict[str, Any]) -> None:
        """Check an answer against what was said before."""
        if answer["kind"] != "snapshots" or answer.get("refused"):
            self.violation(f"{kind} was refused: {answer}")
            return
        snapshots = answer.get("transfers", [])
        if kind not in ("beat", "wait") and len(snapshots) != 1:
            self.violation(f"{kind} was answered with {len(snapshots)} snapshots")
        for seen in snapshots:
            side = self.by_id[seen["transfer_id"]]
            before = side.seen
            if side not in sides:
                self.violation(f"{kind} was answered with another transfer: {seen}")
            for field in ("snapshot", "sent_tokens", "available_tokens", "partial_sent_tokens"):
                if seen.get(field, 0) < before.get(field, 0):
                    self.violation(f"{field} fell from {before} to {seen}")
            if seen["state"] == FAILED or (seen["state"] == SUCCESS and not self.ending):
                self.violation(f"ended too early: {seen}")
            side.seen = seen
            if not side.is_queued and self.can_move(side):
                side.is_queued = True
                self.movable.append(side)

    # --- what to say ---

    def open(self, first: int, count: int) -> None:
        """Open transfers, and wait until all have been answered."""
        for number in range(first, first + count):
            side = Side(number, self.role)
            self.sides.append(side)
            self.by_id[side.name["transfer_id"]] = side  # type: ignore[index]
            name = {"transfer_id": side.name["transfer_id"]}
            if self.role == "source":
                self.call("send", [side], kind="send", **name)
            else:
                self.call("receive", [side], kind="receive", source=self.source, **name)
            while len(self.under_way) >= CREDIT:
                self.read()
        self.settle()

    def can_move(self, side: Side) -> bool:
        """Whether there is room to fill, or something to take over."""
        seen = side.seen
        if self.role == "sink":
            return bool(seen["state"] != SUCCESS and self.takes_to(side) > taken(seen))
        edge = seen["base_tokens"] + seen["allocated_tokens"]
        return bool(seen.get("total_tokens") is None and edge > seen["available_tokens"])

    @staticmethod
    def takes_to(side: Side) -> int:
        """Whole blocks only: the payload is made of them."""
        return int(side.seen["sent_tokens"]) // BLOCK_TOKENS * BLOCK_TOKENS

    def move(self, side: Side) -> None:
        """Fill a block and say so, or look at what has come and take it over."""
        seen, name = side.seen, {"transfer_id": side.name["transfer_id"]}
        if self.role == "source":
            token = seen["available_tokens"]
            self.blocks[side.block_of(token), :BLOCK_TOKENS] = side.content(token)
            self.call("ready", [side], kind="ready", ready_tokens=token + BLOCK_TOKENS, **name)
            return
        self.check(side)
        self.call("resume", [side], kind="resume", sent_tokens=self.takes_to(side), **name)

    def check(self, side: Side) -> None:
        """Look at every token that has come and was not taken over yet."""
        for token in range(taken(side.seen), self.takes_to(side), BLOCK_TOKENS):
            got = self.blocks[side.block_of(token), :BLOCK_TOKENS]
            if not np.array_equal(got, side.content(token)):
                self.violation(f"{side.name} holds {got} at token {token}")

    def next_idle(self, turn: "itertools.cycle[Side]", count: int = 1) -> list[Side]:
        """The next transfers about which no call is under way; fewer if there are no more."""
        looked_at = (next(turn) for _ in self.sides)
        return list(itertools.islice((side for side in looked_at if not side.is_busy), count))

    def say(self, what: str, turn: "itertools.cycle[Side]") -> None:
        """Make one call of the mix."""
        if what == "beat":
            self.call("beat", [], kind="heartbeat")
            return
        if what == "move":
            while self.movable:
                side = self.movable.popleft()
                side.is_queued = False
                if not side.is_busy and self.can_move(side):
                    self.move(side)
                    return
        sides = self.next_idle(turn, BATCH_CALLS if what == "batch" else 1)
        watched = [{**side.name, "after": -1} for side in sides]
        if not sides:
            self.call("beat", [], kind="heartbeat")
        elif what == "wait" and self.waiting < WAITING_MAX:
            watched[0]["after"] = sides[0].seen["snapshot"]
            self.call("wait", sides, kind="poll", transfers=watched, wait_s=0.5)
        elif what == "batch":
            calls = [{"kind": "poll", "transfers": [one]} for one in watched]
            self.call("batch", sides, kind="batch", calls=calls)
        else:
            self.call("poll", sides, kind="poll", transfers=watched)

    # --- the phases ---

    def run(self, seconds: float, rate: float) -> dict[str, Any]:
        """Make ``rate`` calls a second, as far as answers come; say what became of them."""
        self.latencies.clear()
        self.answered.clear()
        turn, mix = itertools.cycle(self.sides), itertools.cycle(MIX)
        begun_s = time.perf_counter()
        sent = 0
        while (now_s := time.perf_counter() - begun_s) < seconds:
            self.read()
            while sent < now_s * rate and len(self.under_way) - self.waiting < CREDIT:
                self.say(next(mix), turn)
                sent += 1
            self.socket.poll(1)
        answered = dict(self.answered)
        self.settle()
        return {"seconds": now_s, "answered": answered, "latencies": dict(self.latencies)}

    def settle(self) -> None:
        """Wait for every answer."""
        until_s = time.perf_counter() + ANSWER_S
        while self.under_way and time.perf_counter() < until_s:
            self.read()
            self.socket.poll(5)
        for number, (kind, _, sides) in self.under_way.items():
            self.violation(f"call {number}, a {kind}, was never answered")
            for side in sides:
                side.is_busy = False
        self.under_way.clear()
        self.waiting = 0

    def finish(self, seconds: float) -> int:
        """End every payload where it is, take the rest over, release; how many came to Success."""
        self.ending = True
        until_s = time.perf_counter() + seconds
        turn = itertools.cycle(self.sides)
        answered, heard_s = 0, time.perf_counter()
        while (now_s := time.perf_counter()) < min(until_s, heard_s + ANSWER_S):
            self.read()
            if self.answered.total() != answered:
                answered, heard_s = self.answered.total(), now_s
            left = [side for side in self.sides if not side.released]
            if not left:
                break
            for side in self.next_idle(turn, CREDIT - len(self.under_way)):
                self.end(side)
            self.socket.poll(1)
        self.settle()
        return sum(side.released for side in self.sides)

    def end(self, side: Side) -> None:
        """The next call that a transfer needs to come to its end."""
        seen, name = side.seen, {"transfer_id": side.name["transfer_id"]}
        if side.released:
            return
        if seen["state"] == SUCCESS:
            if self.role == "sink":
                self.check(side)
            side.released = True
            self.call("release", [side], kind="release", role=self.role, **name)
        elif self.role == "source" and seen.get("total_tokens") is None:
            ready = seen["available_tokens"]
            self.call("ready", [side], kind="ready", ready_tokens=ready, total_tokens=ready, **name)
        elif self.role == "sink" and self.can_move(side):
            self.move(side)
        else:
            self.call("poll", [side], kind="poll", transfers=[{**side.name, "after": -1}])


def taken(seen: dict[str, Any]) -> int:
    """Tokens that were taken over."""
    return int(seen["partial_sent_tokens"])


def main() -> None:
    """Follow what the parent says: one JSON list a line, one JSON answer each."""
    directory, role, source = sys.argv[1:4]
    flood = Flood(Path(directory), role, source or None)
    for line in sys.stdin:
        command, *args = json.loads(line)
        answer = getattr(flood, command)(*args)
        told = {"answer": answer, "violations": flood.violations}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
