"""Two live daemons for the tests of this folder, and the promise that nothing leaks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry_proto import peer
from live import BOOT_ID, LiveDaemon, RawPeer


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """One daemon; after the test it is alive and, all workers gone, every block is free."""
    with LiveDaemon(tmp_path / "a") as live:
        yield live
        assert live.process.poll() is None, live.log()
        live.wait_until_free()
        assert "Traceback" not in live.log()


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[LiveDaemon]:
    """A second one."""
    with LiveDaemon(tmp_path / "b", stall_s=8, connect_s=1) as live:
        yield live
        assert live.process.poll() is None, live.log()
        live.wait_until_free()
        assert "Traceback" not in live.log()


@pytest.fixture
def raw(daemon: LiveDaemon) -> Iterator[RawPeer]:
    """A peer that has said hello."""
    one = RawPeer(daemon.address)
    welcome = one.say(peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1))
    assert isinstance(welcome, peer.PeerWelcome)
    one.source = welcome.boot_id
    yield one
    one.close()
