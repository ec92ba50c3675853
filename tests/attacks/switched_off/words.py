"""What the logs say, and keep."""

import logging
from typing import Any

from attacks.switched_off.replacing import replace
from kvferry_daemon import audit, logs
from kvferry_daemon.core import deeds, openings, readiness
from kvferry_daemon.core.worker_desk import WorkerDesk
from kvferry_proto.errors import FerryError


def audit_shares_the_log() -> None:
    """Lines of the audit log wait among all the others."""
    replace(logs.WriterThread, "_of", lambda self, _record: self.other)


def audit_tells_all() -> None:
    """Every deed has its line, however many there are."""
    replace(audit, "LINES_A_S", 1 << 30)


def level_silences_audit() -> None:
    """The audit log is a log like all others."""
    plain = logs.begin

    def begin(level: str, form: logs.Format) -> None:
        plain(level, form)
        logging.getLogger(logs.AUDIT).setLevel(logging.NOTSET)

    replace(logs, "begin", begin)


def refusals_tell_the_call() -> None:
    """The audit log has the whole of a call that was refused, as is handy for who looks for faults."""
    plain = WorkerDesk._note_refused

    def note(self: WorkerDesk, user: str, call: Any, error: FerryError) -> None:
        plain(self, user, call, FerryError(error.code, repr(call)))

    replace(WorkerDesk, "_note_refused", note)
    replace(deeds, "WHY_MAX", 1 << 30)


def differences_are_shown() -> None:
    """Whoever says something else than before is told both, as is handy for who looks for faults."""
    for one in (openings, readiness):
        replace(one, "difference", lambda before, now: f"aux was {before}, now {now}")


def words_are_lines() -> None:
    """Words of workers go into the log as they are."""
    replace(logs, "plain", lambda words: words)


SWITCHES = (
    audit_shares_the_log,
    audit_tells_all,
    level_silences_audit,
    refusals_tell_the_call,
    differences_are_shown,
    words_are_lines,
)
