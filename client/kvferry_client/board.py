"""The daemon's status board, mapped: snapshots without a message, where it can be trusted."""

import logging
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from enum import StrEnum
from time import monotonic_ns
from typing import NamedTuple

from kvferry_client.calls import made
from kvferry_proto import worker
from kvferry_proto.board import (
    ASK,
    BEAT_WORD,
    HAS_AUX,
    HEADER_BYTES,
    MAGIC,
    SLOT_BYTES,
    VERSION,
    WORD_BYTES,
    Slot,
    board_bytes,
    snapshot_of,
    unpack_header,
    unpack_slot,
    word_of,
)
from kvferry_proto.states import Role

log = logging.getLogger(__name__)
READS_MAX = 16  # of a slot that is being written; then the daemon is asked
NEVER = -1  # a sequence that no slot has
ALWAYS = 1 << 63  # above any number that a worker can be after


class BoardTrouble(StrEnum):
    """Why polls go by message."""

    NOT_THERE = "not_there"  # the daemon has none, or its file cannot be mapped
    NOT_A_BOARD = "not_a_board"
    OTHER_VERSION = "other_version"
    OTHER_LIFE = "other_life"  # it is not the board of the daemon that welcomed us
    TRUNCATED = "truncated"
    STALE = "stale"  # no heartbeat: the daemon is gone or stands still


class Seen(NamedTuple):
    """A snapshot, the slot's sequence that it belongs to, and the answer that brings it."""

    sequence: int
    number: int
    snapshot: worker.Snapshot
    reply: worker.Snapshots


class _Entry:
    """A rank of a transfer that has a slot."""

    __slots__ = ("seen", "slot", "told", "word")

    def __init__(self, slot: worker.BoardSlot, seen: Seen) -> None:
        self.slot = slot
        self.word = word_of(slot.index)
        self.seen = seen
        # A rank of a group has to say by message that it has acted; who is alone need not.
        self.told = ALWAYS if seen.snapshot.world_size == 1 else NEVER


Name = tuple[Role, str, int, int]
NOTHING_NEW = worker.Snapshots()


class Board:
    """One life of the daemon. Snapshots of a rank never get older, whatever threads ask."""

    def __init__(self, welcome: worker.Welcome) -> None:
        """Map the board of the daemon that said this; ``trouble`` tells why not."""
        self.boot_id = welcome.boot_id
        self.trouble: BoardTrouble | None = None
        self._path = welcome.pool.board or ""
        self._lock = threading.Lock()
        self._entries: dict[Name, _Entry] = {}
        self._names: dict[int, Name] = {}  # by slot, so that who has lost one is forgotten
        self._slots = 0
        self._stale_ns = 0
        trouble = self._map()
        if trouble is not None:
            self._say(trouble)
        _BOARDS.add(self)

    def _map(self) -> BoardTrouble | None:
        try:
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < HEADER_BYTES:
                    return BoardTrouble.TRUNCATED
                mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return BoardTrouble.NOT_THERE
        header = unpack_header(mapping[:HEADER_BYTES])
        if header.magic != MAGIC:
            return BoardTrouble.NOT_A_BOARD
        if header.version != VERSION:
            return BoardTrouble.OTHER_VERSION
        if header.boot_id != self.boot_id:
            return BoardTrouble.OTHER_LIFE
        if size != board_bytes(header.slots):
            return BoardTrouble.TRUNCATED
        self._mapping = mapping
        self._words = memoryview(mapping).cast("Q")
        self._slots, self._stale_ns = header.slots, header.stale_ns
        return None

    def look(self, watched: worker.Watched) -> Seen | None:
        """What is known of a transfer now; None: only the daemon can tell."""
        try:
            name = (watched.role, watched.transfer_id, watched.attempt, watched.rank)
        except AttributeError:
            return None  # the call that is none says so
        entry = self._entries.get(name)
        if entry is None or watched.after > entry.told:
            return None
        beat_ns = self._words[BEAT_WORD]  # before the clock: a beat may come in between
        if not 0 <= monotonic_ns() - beat_ns <= self._stale_ns:
            self._say(BoardTrouble.STALE)
            return None
        if self.trouble is not None:
            self._say(None)
        seen = entry.seen
        if self._words[entry.word] != seen.sequence:
            return self._look_closer(entry)
        return seen

    def is_kept(self) -> bool:
        """Whether it is worth while to ask for a slot."""
        if not self._slots:
            return False
        beat_ns = self._words[BEAT_WORD]  # before the clock, as above
        fresh = 0 <= monotonic_ns() - beat_ns <= self._stale_ns
        self._say(None if fresh else BoardTrouble.STALE)
        return fresh

    def note(self, seen: worker.Snapshot, after: int) -> worker.Snapshot:
        """Take in what a poll ``after`` a number was answered; return the newest there is."""
        name = (seen.role, seen.transfer_id, seen.attempt, seen.rank)
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and entry.seen.snapshot.snapshot > seen.snapshot:
                return entry.seen.snapshot  # read on the board while the answer was under way
            if seen.slot is None or not seen.slot.index < self._slots:
                self._forget(name)
                return seen
            if entry is None or entry.slot != seen.slot:
                self._forget(name)
                self._forget(self._names.get(seen.slot.index))
                entry = self._entries[name] = _Entry(seen.slot, _seen(NEVER, seen))
                self._names[seen.slot.index] = name
            else:
                entry.seen = _seen(NEVER, seen)
            entry.told = max(entry.told, after)
            return seen

    def _forget(self, name: Name | None) -> None:
        entry = None if name is None else self._entries.pop(name, None)
        if entry is not None:
            del self._names[entry.slot.index]

    def _look_closer(self, entry: _Entry) -> Seen | None:
        """The slot has been written since, or it was never read."""
        with self._lock:
            slot, seen = self._read(entry.word), entry.seen
            before = seen.snapshot
            if slot is None or slot.key != entry.slot.key or slot.snapshot < before.snapshot:
                return None
            if slot.snapshot == before.snapshot:
                entry.seen = seen._replace(sequence=slot.sequence)
            elif before.world_size > 1 or not _is_whole(slot, before):
                return None
            else:
                entry.seen = _seen(slot.sequence, snapshot_of(slot, before))
            return entry.seen

    def _read(self, word: int) -> Slot | None:
        """A slot as it was at one moment; None if that cannot be had."""
        first = word * WORD_BYTES
        for _ in range(READS_MAX):
            slot = unpack_slot(self._mapping[first : first + SLOT_BYTES])
            if slot is not None and self._words[word] == slot.sequence:
                return slot
        return None

    def _say(self, trouble: BoardTrouble | None) -> None:
        """Log why polls go by message from now on, or that they need not; once."""
        if trouble is not self.trouble:
            self.trouble = trouble
            if trouble is None:
                log.info("polls go by status board %s again", self._path)
            else:
                log.warning("polls go by message, status board %r is %s", self._path, trouble)

    def leave(self) -> None:
        """Look here no more. A child of a fork does so, too: no lock that a thread may hold."""
        self._entries, self._names, self._slots = {}, {}, 0


class Poll:
    """One poll: what the board has, and the call that asks for the rest."""

    def __init__(
        self, board: Board | None, transfers: Sequence[worker.Watched], wait_s: float
    ) -> None:
        """Look; ``call`` is None if that was enough. FerryError(bad_message) for a bad poll."""
        call = made(worker.Poll, {"transfers": list(transfers), "wait_s": wait_s})
        self.call: worker.Poll | None = call
        self._after: dict[Name, int] = {}
        for one in call.transfers:
            self._after[_name(one)] = min(one.after, self._after.get(_name(one), one.after))
        self._news: list[worker.Snapshot] = []
        if board is None:
            return
        found = [(one, board.look(one)) for one in call.transfers]
        news = [seen.snapshot for one, seen in found if seen and seen.number > one.after]
        rest = [one for one, seen in found if seen is None]
        if not rest and (news or not wait_s):
            self.call, self._news = None, news
        elif not wait_s:
            self._news = news
            self.call = worker.Poll(transfers=rest, board=board.is_kept())

    def answer(self, board: Board | None, reply: worker.Snapshots | None) -> worker.Snapshots:
        """All news, in one reply; ``board``: of the daemon that answered the call, if one did."""
        if reply is None:
            return _reply_of(self._news)
        for seen in reply.transfers:
            after = self._after[_name(seen)]
            newest = seen if board is None else board.note(seen, after)
            if newest.snapshot > after:
                self._news.append(newest)
        return reply.model_copy(update={"transfers": self._news})


_BOARDS: weakref.WeakSet[Board] = weakref.WeakSet()


def _leave_all() -> None:
    """A client does not survive a fork; its calls say so."""
    for board in list(_BOARDS):
        board.leave()


os.register_at_fork(after_in_child=_leave_all)


def _name(one: worker.Watched | worker.Snapshot) -> Name:
    return (one.role, one.transfer_id, one.attempt, one.rank)


def _seen(sequence: int, snapshot: worker.Snapshot) -> Seen:
    return Seen(sequence, snapshot.snapshot, snapshot, _reply_of([snapshot]))


def _reply_of(news: list[worker.Snapshot]) -> worker.Snapshots:
    return worker.Snapshots.model_construct(call=0, transfers=news, refused=[])


def _is_whole(slot: Slot, before: worker.Snapshot) -> bool:
    """Whether the slot has all that a snapshot shows, with what was known before."""
    return not slot.flags & ASK and (not slot.flags & HAS_AUX or before.aux is not None)
