"""libzmq's own thread, and when it may take a core from us.

It sleeps between messages, so Linux lets it run at once whenever a send wakes it, in the place of
the loop if no core is free: two switches for every message. As a batch thread it waits until a core
is. That makes a busy daemon on few cores several times faster, and a quiet one a little slower,
which waits for the answer (docs/decisions/0006); so it depends on whether the loop is behind.
"""

import os
from contextlib import suppress
from pathlib import Path

TASKS = Path("/proc/self/task")
NAME = "ZMQbg/IO"  # libzmq's, with a number behind it


class IoThreads:
    """The I/O threads of this process's contexts."""

    def __init__(self) -> None:
        self._patient = False

    def be_patient(self, patient: bool) -> None:
        """Let them wait for a free core, or not; costs nothing if it is so already."""
        if patient == self._patient:
            return
        self._patient = patient
        policy = os.SCHED_BATCH if patient else os.SCHED_OTHER
        for task in TASKS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
                if (task / "comm").read_text().startswith(NAME):
                    os.sched_setscheduler(int(task.name), policy, os.sched_param(0))
