"""What the HTTP pages need of the daemon beside the node's books."""

from collections.abc import Callable
from dataclasses import dataclass

from kvferry_proto import control


@dataclass(frozen=True, slots=True)
class Facts:
    """Questions to the daemon; each is asked anew for every answer."""

    host: str  # as the config names it
    now_s: Callable[[], float]  # the books' clock, which they themselves read at events only
    insecure: bool
    by_tenant: bool  # workers are strangers to each other, and anybody here may be one
    status: Callable[[], control.Status]
    loop: Callable[[], control.LoopStatus]
    not_sent: Callable[[], int]  # messages that no link could take
    failing: Callable[[], str]  # why the ledger cannot be written; empty: it can
