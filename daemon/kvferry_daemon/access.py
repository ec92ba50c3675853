"""Which users of this machine may do what. Who somebody is, the kernel says."""

import grp
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = 0
OVERFLOW = Path("/proc/sys/kernel/overflowuid")


@dataclass(frozen=True, slots=True)
class Users:
    """Root, some users, and the processes that run with some groups as their own."""

    uids: frozenset[int]
    gids: frozenset[int] = frozenset()
    but: int | None = None  # a user that is not let in for its group

    def include(self, uid: int, gid: int) -> bool:
        """Whether a process of this user, with this group, is one of them."""
        return uid == ROOT or uid in self.uids or (gid in self.gids and uid != self.but)

    def has(self, user: str) -> bool:
        """The same of a ``uid:gid:pid``."""
        uid, gid, _ = map(int, user.split(":"))
        return self.include(uid, gid)


@dataclass(frozen=True, slots=True)
class Access:
    """The daemon's own user and root may do all; a group each may be let in beside them."""

    worker_gid: int | None = None
    operator_gid: int | None = None
    by_tenant: bool = False  # workers of different users are strangers to each other

    @property
    def directory_gid(self) -> int | None:
        """Whose processes reach the sockets at all."""
        return self.operator_gid if self.worker_gid is None else self.worker_gid

    @property
    def workers(self) -> Users:
        """Who may open transfers, and map pools."""
        return _ours_and(self.worker_gid, but=overflow_uid() if self.by_tenant else None)

    @property
    def operators(self) -> Users:
        """Who may drain, abort and set the log level."""
        return _ours_and(self.operator_gid)

    @property
    def readers(self) -> Users:
        """Who may read what operators read: a transfer's id is enough to pull it elsewhere."""
        if self.by_tenant:
            return self.operators
        return _ours_and(self.worker_gid, self.operator_gid)


def _ours_and(*gids: int | None, but: int | None = None) -> Users:
    ours = frozenset((os.getuid(),))
    return Users(ours, frozenset(gid for gid in gids if gid is not None), but)


@cache
def overflow_uid() -> int:
    """What the kernel calls every user that has no number here: of another user namespace."""
    try:
        return int(OVERFLOW.read_text())
    except (OSError, ValueError):
        return 65534


def gid_of(group: str) -> int:
    """The number of a group, which may be named by it; KeyError if there is none of that name."""
    return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid


PRIVATE = Access()
