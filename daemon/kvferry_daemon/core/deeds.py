"""What people and programs did, for the audit log: no secret and no payload is in it."""

from typing import NamedTuple

KEPT_MAX = 1024  # of one turn: the log has room for fewer


class Deed(NamedTuple):
    """Somebody did something, or was not let do it.

    ``user``: uid:gid:pid as the kernel has it, or the name of a peer. ``name``: what it calls itself;
    ``asked``: the kind of the message that was refused, or said by an operator.
    """

    what: str
    user: str
    name: str = ""
    asked: str = ""
    role: str = ""
    transfer_id: str = ""
    attempt: int | None = None
    code: str = ""
    why: str = ""
