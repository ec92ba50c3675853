"""What keeps the loop and its queues free."""

from attacks.switched_off.replacing import replace
from kvferry_daemon.inbound import Inbound


def work_is_free() -> None:
    """Whoever holds the loop up is read as fast as anybody."""
    replace(Inbound, "is_unwanted_of_worker", lambda _self, _route, _user: False)


SWITCHES = (work_is_free,)
