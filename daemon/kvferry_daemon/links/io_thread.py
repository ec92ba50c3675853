"""libzmq's own thread, and when it may take a core from us.

It sleeps between messages, so Linux lets it run at once whenever a send wakes it, in the place of
the loop if no core is free: two switches for every message. As a batch thread it waits until a core
is. That makes a busy daemon on few cores several times faster, and a quiet one a little slower,
which waits for the answer (docs/decisions/0006); so it depends on whether the loop is behind.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

TASKS = Path("/proc/self/task")
NAME = b"ZMQbg/IO"  # libzmq's, with a number behind it
CLASSES = (os.SCHED_OTHER, os.SCHED_BATCH)  # before, and while patient
log = logging.getLogger(__name__)


class IoThreads:
    """The I/O threads of this process's contexts."""

    def __init__(self) -> None:
        self._patient = False
        self._refused = False

    def be_patient(self, patient: bool) -> None:
        """Let them wait for a free core, or not; costs nothing if it is so already.

        It only makes us faster, so it never raises: a sandbox may forbid it, or have no /proc.
        """
        if patient == self._patient:
            return
        self._patient = patient
        try:
            _move(*(CLASSES if patient else CLASSES[::-1]))
        except OSError as error:
            if not self._refused:
                log.warning("libzmq's threads take the core as before: %s", error)
            self._refused = True


def _move(before: int, after: int) -> None:
    """Those of another class were put there by the operator, and stay."""
    for task in TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
            if (task / "comm").read_bytes().startswith(NAME):
                number = int(task.name)
                if os.sched_getscheduler(number) == before:
                    os.sched_setscheduler(number, after, os.sched_param(0))
