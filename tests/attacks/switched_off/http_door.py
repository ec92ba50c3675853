"""Metrics, probes and the status page."""

from attacks.switched_off.replacing import replace
from kvferry_daemon.http import door


def dear_requests() -> None:
    """The scene: a host has a twentieth of the loop's time, which any machine's requests are over."""
    replace(door, "SHARE_S", door.SHARE_S / 5)


def open_http() -> None:
    """As many connections by HTTP as anybody likes, for as long as he likes."""
    replace(door.HttpDoor, "__call__", lambda self: self._server())
    replace(door.HttpDoor, "answer", lambda _self, request, handler: handler(request))


def any_host() -> None:
    """By HTTP the daemon answers under whatever name it is asked."""
    replace(door, "is_ours", lambda _said, _host: True)


SWITCHES = (
    dear_requests,
    open_http,
    any_host,
)
