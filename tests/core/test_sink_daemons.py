"""Which life of which daemon speaks: a later one ends the one before, never the other way."""

import pytest

from core.test_sink_table import after, pulled
from core.test_source_table import source_in
from kvferry_daemon.core import events as ev
from kvferry_daemon.core.sink_daemons import LINKS_OF_ONE, SINKS_MAX, SinkDaemons
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import PeerHello
from kvferry_proto.states import State

DAEMON = "d" * 16
FIRST, SECOND = "1" * 16, "2" * 16


def route_of(daemons: SinkDaemons, boot_id: str) -> bytes:
    daemon = daemons.get(boot_id)
    assert daemon is not None
    return daemon.route


def hello(boot_id: str, life: int, daemon_id: str = DAEMON) -> PeerHello:
    return PeerHello(boot_id=boot_id, daemon_id=daemon_id, life=life)


def test_a_later_life_ends_the_one_before() -> None:
    daemons = SinkDaemons()
    assert daemons.hello(b"one", "", hello(FIRST, 1), 0.0) == []
    assert daemons.hello(b"two", "", hello(SECOND, 2), 0.0) == [FIRST]
    assert route_of(daemons, SECOND) == b"two"
    with pytest.raises(FerryError) as caught:
        daemons.seen(FIRST, b"one", "", 0.0)  # what it said before it died, late
    assert caught.value.code is Code.HELLO_FIRST


def test_a_late_hello_of_an_earlier_life_changes_nothing() -> None:
    daemons = SinkDaemons()
    daemons.hello(b"two", "", hello(SECOND, 2), 0.0)
    with pytest.raises(FerryError) as caught:
        daemons.hello(b"one", "", hello(FIRST, 1), 0.0)
    assert caught.value.code is Code.DAEMON_RESTARTED
    assert daemons.seen(SECOND, b"two", "", 0.0).daemon_id == DAEMON


def test_the_same_hello_from_a_new_connection_moves_the_route() -> None:
    daemons = SinkDaemons()
    daemons.hello(b"one", "", hello(FIRST, 1), 0.0)
    assert daemons.hello(b"other", "", hello(FIRST, 1), 0.0) == []
    assert route_of(daemons, FIRST) == b"other"


def test_a_boot_id_stays_with_its_daemon() -> None:
    """Else a hello under another name would take its link over, and leave both half known."""
    daemons = SinkDaemons()
    daemons.hello(b"one", "", hello(FIRST, 1), 0.0)
    with pytest.raises(FerryError) as caught:
        daemons.hello(b"thief", "", hello(FIRST, 1, "e" * 16), 0.0)
    assert caught.value.code is Code.PEER_PROTOCOL
    assert route_of(daemons, FIRST) == b"one"
    assert daemons.hello(b"two", "", hello(SECOND, 2), 0.0) == [FIRST]


def test_the_silent_ones_are_forgotten_first() -> None:
    daemons = SinkDaemons()
    for number in range(SINKS_MAX):
        assert daemons.hello(b"r", "", hello(f"{number:016x}", 1, f"{number:016x}"), 0.0) == []
    daemons.seen(f"{0:016x}", b"r", "", 0.0)
    assert daemons.hello(b"r", "", hello(FIRST, 1), 0.0) == [f"{1:016x}"]
    assert f"{0:016x}" in daemons
    assert daemons.hello(b"r", "", hello(f"{1:016x}", 1, f"{1:016x}"), 0.0) == [
        f"{2:016x}"
    ]  # may return


def test_those_that_were_heard_last_are_told_and_no_more() -> None:
    daemons = SinkDaemons()
    for number in range(10):
        boot_id = f"{number:016x}"
        daemons.hello(b"r", "", hello(boot_id, 1, boot_id), float(number))
    daemons.seen(f"{0:016x}", b"r", "", 20.0)
    told = [one.boot_id for one in daemons.last_heard(7.0, 10)]
    assert told == [f"{number:016x}" for number in (7, 8, 9, 0)]
    assert [one.boot_id for one in daemons.last_heard(0.0, 2)] == told[-2:]


def test_one_peer_has_so_many_links_and_drives_nobody_out() -> None:
    daemons = SinkDaemons()
    daemons.hello(b"r", "honest", hello(FIRST, 1), 0.0)
    for number in range(LINKS_OF_ONE):  # each under an id that it makes up
        assert daemons.hello(b"r", "hog", hello(f"{number:016x}", 1, f"{number:016x}"), 0.0) == []
    over = daemons.hello(b"r", "hog", hello("f" * 16, 1, "f" * 16), 0.0)
    assert over == [f"{0:016x}"]
    assert f"{0:016x}" not in daemons
    assert FIRST in daemons


def test_a_source_goes_on_with_the_next_life_of_its_sink_and_its_new_numbers() -> None:
    source = source_in(State.TRANSFERRING)
    before = pulled(9)
    after(source, ev.Pulled(FIRST, before.daemon, before.pull))
    news = after(source, ev.Pulled(SECOND, before.daemon, pulled(1).pull))
    [progress] = [e for e in news if isinstance(e, ev.SendProgress)]
    assert (progress.number, progress.sink, progress.error) == (1, SECOND, None)
