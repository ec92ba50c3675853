"""Bounds of what the daemon keeps."""

import os
import time
from typing import Any

from attacks.switched_off.replacing import replace
from kvferry_daemon.core import node, plans, polls, sink_desk, source_desk, tombstones, welcome
from kvferry_daemon.core.sink_daemons import SinkDaemon
from kvferry_daemon.core.source_desk import SourceDesk
from kvferry_daemon.core.tombstones import Tombstone, Tombstones
from kvferry_daemon.links import liveness
from kvferry_daemon.links.liveness import Liveness
from kvferry_daemon.links.pressure import Pressure
from kvferry_proto.states import State

WITHOUT_END = 1 << 30
FEW_A_S = 100


def processes_have_any_sessions() -> None:
    """Of all the sessions that there may be, one process may have as many as it likes."""
    replace(welcome, "SESSIONS_OF_ONE_MAX", WITHOUT_END)


def tenants_have_any_sessions() -> None:
    """Of all the sessions that there may be, one tenant may have all."""
    replace(welcome, "TENANT_SHARE", 1)


def anybody_names_any_sources() -> None:
    """All of the links that there may be may be one worker's, or one tenant's."""
    replace(sink_desk, "PEERS_OF_ONE_MAX", WITHOUT_END)


def unknown_ends_have_no_rate() -> None:
    """Of transfers that nobody knows, peers may end as many as they can name."""
    replace(source_desk, "UNKNOWN_ENDS_A_S", WITHOUT_END)


def unknown_ends_are_few() -> None:
    """The scene of both runs: fewer than a slow machine can say in a second."""
    replace(source_desk, "UNKNOWN_ENDS_A_S", FEW_A_S)


def unknown_ends_are_not_counted() -> None:
    """And what they say has ended is remembered like what workers have had."""
    unknown_ends_have_no_rate()
    replace(tombstones, "UNKNOWN_MAX", WITHOUT_END)


def late_ends_are_noted_again() -> None:
    """Whatever is said of a transfer that is remembered, it is kept anew."""
    plain = Tombstones.on_done
    replace(Tombstones, "on_done", lambda *args: plain(*args) or True)


def anybody_is_believed_late() -> None:
    """Who says that a source has arrived is believed once that is only remembered."""
    plain = SourceDesk._may_end

    def may_end(self: SourceDesk, known: Any, sink: SinkDaemon, state: State) -> bool:
        return isinstance(known, Tombstone) or plain(self, known, sink, state)

    replace(SourceDesk, "_may_end", may_end)


def workers_watch_all() -> None:
    """The polls of one worker may wait for as many transfers as those of all together."""
    memory_may_grow()
    replace(polls, "WATCHED_OF_ONE_MAX", WITHOUT_END)


def polls_are_answered_at_once() -> None:
    """All polls that wait for a change are answered in the turn that brings it."""
    memory_may_grow()
    replace(node, "ANSWERS_A_TURN_BYTES", 1 << 40)


def every_layout_is_worked_out() -> None:
    """Whoever shows us a layout has us work out what goes where."""
    for bound in ("NEW_MAX", "SHARED_MAX", "ALL_A_S"):
        replace(plans, bound, WITHOUT_END)


def locks_of_nobody_are_kept() -> None:
    """Each file in `workers/` that somebody holds may cost a descriptor of ours."""
    replace(liveness, "KEPT_MAX", WITHOUT_END)


def locks_have_any_time() -> None:
    """A file in `workers/` is as old as it says."""
    plain = Liveness._look

    def look(self: Liveness, entry: os.DirEntry[str]) -> bool:
        made_s = entry.stat(follow_symlinks=False).st_mtime
        return made_s <= time.time() and plain(self, entry)

    replace(Liveness, "_look", look)


def memory_may_grow() -> None:
    """It would be seen to, and idle connections be cut for what another one has us keep."""
    replace(Pressure, "_relieve", lambda _self, _grown_bytes: True)


SWITCHES = (
    processes_have_any_sessions,
    tenants_have_any_sessions,
    anybody_names_any_sources,
    unknown_ends_have_no_rate,
    unknown_ends_are_few,
    unknown_ends_are_not_counted,
    late_ends_are_noted_again,
    anybody_is_believed_late,
    workers_watch_all,
    polls_are_answered_at_once,
    every_layout_is_worked_out,
    locks_of_nobody_are_kept,
    locks_have_any_time,
)
