"""Whose a pool is. Tenants share none, and nothing passes between them within a daemon.

A pool's name says it: the layout's digest, and behind it the tenant, if there is more than one.
"""

import re
from functools import lru_cache
from typing import Literal

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Layout

Tenancy = Literal["off", "uid"]
ALL = ""  # the one tenant that all workers are
UID_MAX = (1 << 32) - 2  # the last number stands for nobody
_UID = "uid"
_TENANT = re.compile(_UID + "(0|[1-9][0-9]{0,9})")
USERS_KEPT = 4096  # of whom is asked again and again: all are looked through for each hello


def tenant_of(user: str, tenancy: Tenancy) -> str:
    """The tenant of a process that the kernel says is ``user`` (uid:gid:pid)."""
    return ALL if tenancy == "off" else _UID + user.partition(":")[0]


@lru_cache(maxsize=USERS_KEPT)
def process_of(user: str) -> str:
    """The process of a ``uid:gid:pid``; all of its user where the kernel tells no number (0)."""
    uid, _, rest = user.partition(":")
    pid = rest.rpartition(":")[2]
    return uid if pid in ("", "0") else f"{uid}:{pid}"


def sharer_of(user: str, tenancy: Tenancy) -> str:
    """Who has to leave room for others, under a bound of all: a process, or a whole tenant."""
    return process_of(user) if tenancy == "off" else tenant_of(user, tenancy)


def pool_id_of(layout: Layout, tenant: str) -> str:
    """The name of the pool that a tenant has for a layout."""
    name = layout.digest.hex()
    return name if tenant == ALL else f"{name}-{tenant}"


def tenant_in(pool_id: str) -> str:
    """The tenant that a pool belongs to."""
    return pool_id.partition("-")[2]


def uid_in(pool_id: str) -> int | None:
    """The one user who may open a pool's files; None: whoever may connect.

    Raises ValueError for a tenant that there cannot be.
    """
    tenant = tenant_in(pool_id)
    if tenant == ALL:
        return None
    found = _TENANT.fullmatch(tenant)
    if found is None or int(found[1]) > UID_MAX:
        raise ValueError(f"pool {pool_id} is of no tenant that there can be")
    return int(found[1])


def are_one(pool_id: str, other: str) -> bool:
    """Whether two pools are of one tenant."""
    return tenant_in(pool_id) == tenant_in(other)


def not_yours(transfer_id: str) -> FerryError:
    """How a tenant is told that a transfer is another one's."""
    return FerryError(Code.NOT_YOUR_TRANSFER, f"{transfer_id!r} was opened by another tenant")
