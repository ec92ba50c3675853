"""What holds workers and operators: whose a session and a transfer are, and how much there may be."""

import zmq

from attacks.switched_off.doors import options
from attacks.switched_off.replacing import replace
from kvferry_daemon import access
from kvferry_daemon.core import tombstones, worker_desk
from kvferry_daemon.core.aux_books import AuxBooks
from kvferry_daemon.core.opening import Opened
from kvferry_daemon.core.openings import Openings
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.sink_desk import SinkDesk
from kvferry_daemon.core.worker_desk import WorkerDesk
from kvferry_daemon.links import zap
from kvferry_daemon.memory import host


def anybody_connects() -> None:
    """The worker socket lets every process in that reaches it."""

    def admit(_self: zap.LocalDoor, request: zap.Request) -> str:
        found = zap.LOCAL.fullmatch(request.address)
        assert found is not None
        return ":".join(found.groups())

    replace(zap.LocalDoor, "__call__", admit)


def anybody_operates() -> None:
    """Whoever may read what operators read may change it, too."""
    replace(access.Users, "has", lambda _self, _user: True)


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


def handover() -> None:
    """Who connects under a routing id that is in use has it, and the session with it."""
    routes_are_trusted()
    options(zmq.ROUTER_HANDOVER, 1)


def transfers_are_everybodys() -> None:
    """Whoever knows a transfer's id may do with it what its own worker may."""
    replace(Openings, "check_owner", lambda _self, _session, _key, _rank: None)


def anybody_retries() -> None:
    """A higher attempt ends the one before it, whoever opens it."""
    replace(Openings, "_check_retry", lambda _self, _session, _key, _newest: None)


def no_zeroing() -> None:
    """Blocks are handed out as they come back."""
    replace(host.HostPool, "zero", lambda _self, _first_block, _blocks: None)


def tenants_meet() -> None:
    """Whoever knows a transfer's id may receive it, and end it."""
    replace(Openings, "_check_tenant", lambda _self, _session, _key: None)
    replace(Openings, "are_strangers", lambda _self, _key, _other: False)
    replace(SinkDesk, "_is_us", lambda _self, _address: False)


def answers_are_made_whole() -> None:
    """An answer has all that was asked for, as often as it was; how large it is is seen then."""
    replace(worker_desk, "once_each", lambda asked: asked)
    replace(worker_desk, "check_fits", lambda _answer, _room_bytes=0: None)


def ended_ones_keep_their_aux() -> None:
    """What is remembered of a transfer that is over has all that it had."""
    replace(tombstones, "without_aux", lambda snapshot: snapshot)
    replace(Opened, "by", lambda call, pool_id: Opened(call, None, pool_id))


def aux_is_not_counted() -> None:
    """Live transfers may have as many aux values as they like."""
    replace(AuxBooks, "check", lambda _self, _opening, _aux: None)


SWITCHES = (
    anybody_connects,
    anybody_operates,
    secret_is_enough,
    routes_are_trusted,
    handover,
    transfers_are_everybodys,
    anybody_retries,
    no_zeroing,
    tenants_meet,
    answers_are_made_whole,
    ended_ones_keep_their_aux,
    aux_is_not_counted,
)
