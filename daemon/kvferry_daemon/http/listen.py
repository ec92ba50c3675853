"""The HTTP port, taken before anything else: a daemon that cannot have it does not start."""

import importlib.util
import socket

NEEDED = ("aiohttp", "prometheus_client")


class HttpRefused(OSError):
    """There is no HTTP as it was asked for; the message says why and what to do."""


class HttpMissing(HttpRefused):
    """What it needs is not installed."""


def check_installed() -> None:
    """HttpMissing where its extra is not installed."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise HttpMissing(
            f"http_port needs {' and '.join(absent)}: pip install 'kvferry[http]', or leave it out"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. HttpRefused if that cannot be."""
    check_installed()
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=64)
    except OSError as error:
        raise HttpRefused(
            f"cannot listen for HTTP at {host}:{port}: {error.strerror or error}; end what has that "
            "port, or set another http_port (0 takes a free one)"
        ) from error


def url_of(listener: socket.socket) -> str:
    """Where it can be reached."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
