"""Two network namespaces with a wire between them, if this machine lets us have them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ADDRESS = {"source": "10.213.7.1", "sink": "10.213.7.2"}


class Network:
    """Each daemon in a namespace of its own; the wire can be cut, and made to lose one way."""

    def __init__(self) -> None:
        self._namespace = {name: f"kvferry-{name}-{os.getpid()}" for name in ADDRESS}
        self._device = {name: f"kvf-{name}" for name in ADDRESS}

    def prefix(self, name: str) -> list[str]:
        """In front of a command that is to run there."""
        return ["ip", "netns", "exec", self._namespace[name]]

    def make(self) -> None:
        """Both namespaces and the wire; subprocess.CalledProcessError if that is not permitted."""
        (one, two) = ADDRESS
        for name in ADDRESS:
            _ip("netns", "add", self._namespace[name])
        first = ["link", "add", self._device[one], "netns", self._namespace[one], "type", "veth"]
        _ip(*first, "peer", "name", self._device[two], "netns", self._namespace[two])
        for name, address in ADDRESS.items():
            self._inside(name, "addr", "add", f"{address}/24", "dev", self._device[name])
            self._inside(name, "link", "set", "lo", "up")
            self._inside(name, "link", "set", self._device[name], "up")

    def remove(self) -> None:
        """Both, and with them the wire."""
        for namespace in self._namespace.values():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def cut(self) -> None:
        """Nothing passes in either direction."""
        self._inside("sink", "link", "set", self._device["sink"], "down")

    def mend(self) -> None:
        """Everything passes."""
        self._inside("sink", "link", "set", self._device["sink"], "up")

    def lose_from(self, name: str) -> None:
        """What this side sends is lost; it still hears the other one."""
        (other,) = set(ADDRESS) - {name}
        self._inside(name, "route", "add", "blackhole", f"{ADDRESS[other]}/32")

    def find_from(self, name: str) -> None:
        """The end of that."""
        (other,) = set(ADDRESS) - {name}
        self._inside(name, "route", "del", "blackhole", f"{ADDRESS[other]}/32")

    def _inside(self, name: str, *args: str) -> None:
        _ip("-n", self._namespace[name], *args)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], capture_output=True, check=True)


@contextmanager
def network() -> Iterator[Network]:
    """A network; skips the test where none is to be had."""
    one = Network()
    try:
        one.make()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        one.remove() if isinstance(error, subprocess.CalledProcessError) else None
        pytest.skip(f"needs the right to make network namespaces, and `ip`: {error}")
    try:
        yield one
    finally:
        one.remove()
