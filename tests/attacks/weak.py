"""`kvferry` with one defence switched off, by its name: `python -m attacks.weak NAME serve ...`.

The attacks run against it too: one that fails there as well proves nothing about the defence. This
is the only place where a defence can be switched off; the product has no such option.
"""

import sys
from collections.abc import Callable
from typing import Any

from kvferry_daemon.command import main
from kvferry_daemon.core.node import Session
from kvferry_daemon.core.worker_desk import WorkerDesk
from kvferry_daemon.links import zap


def anybody_connects() -> None:
    """The worker socket lets every process in that reaches it."""

    def admit(_self: zap.LocalDoor, request: zap.Request) -> str:
        found = zap.LOCAL.fullmatch(request.address)
        assert found is not None
        return ":".join(found.groups())

    replace(zap.LocalDoor, "__call__", admit)


def secret_is_enough() -> None:
    """A session may be taken up by whoever knows its secret."""
    anybody_connects()
    replace(Session, "belongs_to", lambda _self, _user: True)


def routes_are_trusted() -> None:
    """Whoever has a connection's routing id has its session."""
    anybody_connects()
    plain = WorkerDesk.session_at

    def session_at(self: WorkerDesk, route: bytes, _user: str) -> Session | None:
        return plain(self, route, self._routes.get(route, ("", ""))[1])

    replace(WorkerDesk, "session_at", session_at)


def replace(owner: type, name: str, weak: Any) -> None:
    """Put the weak one in place, where there was one before."""
    assert name in vars(owner), f"{owner} has no {name} any more"
    setattr(owner, name, weak)


WEAK: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (anybody_connects, secret_is_enough, routes_are_trusted)
}

if __name__ == "__main__":
    WEAK[sys.argv.pop(1)]()
    main()
