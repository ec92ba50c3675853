"""What goes wrong beside the bytes: daemons that go at the worst moment, engines that say it twice."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.pages import Pages, two_engines
from kvferry_client.engine import Ferry
from kvferry_client.engine_thread import JOIN_WAIT_S
from kvferry_client.paged import PagedCache
from live import BLOCK, WAIT_S, WINDOW, LiveDaemon

AT_ONCE_S = JOIN_WAIT_S / 2


@pytest.fixture
def a(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The source's daemon."""
    with LiveDaemon(tmp_path / "a") as daemon:
        yield daemon


@pytest.fixture
def b(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The sink's daemon."""
    with LiveDaemon(tmp_path / "b") as daemon:
        yield daemon


class Gate(list[int]):
    """A block table that holds up whoever looks at it."""

    def __init__(self, table: list[int]) -> None:
        super().__init__(table)
        self.reached, self.opened = threading.Event(), threading.Event()

    def __getitem__(self, which: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(WAIT_S)
        return super().__getitem__(which)


def test_decode_goes_on_though_its_daemon_goes_before_it_is_told(
    a: LiveDaemon, b: LiveDaemon
) -> None:
    """All tokens are in the pages: whether the daemon hears of it is no matter of the engine's."""
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(9), Gate(decode.take(9))
        prefill.compute(table, 0, 9)
        source.send("t", total_tokens=9).computed([table], 9)
        incoming = sink.receive("t", source=a.address, tables=[theirs], first_token=0, end_token=9)
        assert theirs.reached.wait(WAIT_S)
        b.stop()
        theirs.opened.set()
        assert incoming.wait(5)  # a call that nobody answers takes 10 s
        assert incoming.error is None
        assert incoming.taken_tokens == 9
        assert decode.wrong(list(theirs), 0, 9) == []


def test_an_abort_that_comes_too_late_is_nothing(
    a: LiveDaemon, b: LiveDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = Pages(), Pages()
    with caplog.at_level(logging.WARNING), two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(9), decode.take(9)
        prefill.compute(table, 0, 9)
        outgoing = source.send("t", total_tokens=9)
        outgoing.computed([table], 9)
        incoming = sink.receive("t", source=a.address, tables=[theirs], first_token=0, end_token=9)
        assert incoming.wait(WAIT_S)
        assert outgoing.wait(WAIT_S)
        outgoing.abort("too late")
        incoming.abort("too late")
    assert incoming.error is outgoing.error is None
    assert caplog.records == []


def test_an_abort_that_is_said_again_and_again_reaches_the_daemon(tmp_path: Path) -> None:
    """The daemon is away; what would tell it later must not be given up, too."""
    prefill = Pages()
    with LiveDaemon(tmp_path / "a") as a, prefill.ferry(a.directory) as source:
        table = prefill.take(WINDOW)
        outgoing = source.send("t", total_tokens=WINDOW)
        outgoing.computed([table], BLOCK)
        a.wait_for_transfer("t", lambda seen: seen.snapshot.available_tokens == BLOCK)
        a.pause()
        for turn in range(5):
            outgoing.abort("the client went away")
            other = source.send(f"other{turn}", total_tokens=1)
            other.abort("only to see that what was said before was heard")
            assert other.wait(WAIT_S)
        a.resume()
        a.wait_until_free()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_table_that_ends_too_early_is_an_error(a: LiveDaemon, b: LiveDaemon, side: str) -> None:
    """Tokens that no entry speaks of would travel as whatever lay in the pool before."""
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(WINDOW), decode.take(WINDOW)
        prefill.compute(table, 0, WINDOW)
        (table if side == "prefill" else theirs).pop()
        outgoing = source.send("t", total_tokens=WINDOW)
        outgoing.computed([table], WINDOW)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=WINDOW
        )
        assert incoming.wait(WAIT_S)
        assert outgoing.wait(WAIT_S)
        error = outgoing.error if side == "prefill" else incoming.error
        assert error is not None
        assert error.code == "bad_block_table"
        assert "a block table of 7 entries, 8 are needed for 64 tokens" in str(error)


def test_a_mistake_in_a_copy_is_logged_where_it_happened(
    a: LiveDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = Pages()
    with prefill.ferry(a.directory) as source:
        outgoing = source.send("t", total_tokens=9)
        outgoing.computed([], 9)  # of one cache
        assert outgoing.wait(WAIT_S)
        assert outgoing.error is not None
        assert outgoing.error.code == "internal"
    (said,) = [one for one in caplog.records if one.exc_info]
    assert said.exc_info is not None
    assert said.exc_info[0] is ValueError
    assert "transfer t, attempt 0" in said.getMessage()


def test_who_wants_nothing_says_so(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table = prefill.take(9)
        source.send("t", total_tokens=9).computed([table], 8)  # with all it may be over before
        declined = sink.receive("t", source=a.address, tables=[], first_token=0, end_token=0)
        assert declined.wait(WAIT_S)
        assert "no token is wanted" in str(declined.error)
        seen = a.wait_for_transfer("t", lambda seen: seen.snapshot.error is not None)
        assert seen.snapshot.error is not None
        assert "no token is wanted" in seen.snapshot.error.message


def test_a_pool_that_an_engine_does_not_see_is_said_and_tried_again(a: LiveDaemon) -> None:
    """As in a container without that mount: nobody would try to join any more, nor say why."""
    prefill = Pages()
    with prefill.ferry(a.directory):
        pass  # the daemon has the pool open from now on
    pools = a.directory / "pools"
    pools.rename(a.directory / "away")
    with Ferry(a.directory, prefill.layout, [PagedCache(prefill.layers)]) as ferry:
        outgoing = ferry.send("t", total_tokens=1)
        assert outgoing.wait(WAIT_S)
        assert outgoing.error is not None
        assert str(pools) in str(outgoing.error)
        (a.directory / "away").rename(pools)
        assert ferry.wait_until_joined(WAIT_S)
        assert ferry.refusal is None


def test_the_daemons_address_can_be_asked_for_while_it_is_joined_anew(tmp_path: Path) -> None:
    """An engine does so in each of its steps."""
    prefill = Pages()
    a = LiveDaemon(tmp_path / "a")
    with prefill.ferry(a.directory) as ferry:
        assert ferry.peer_address == a.address
        ask = threading.Event()
        seen: list[BaseException | str | None] = []

        def asks() -> None:
            while not ask.is_set():
                try:
                    seen.append(ferry.peer_address)
                except AssertionError as error:
                    seen.append(error)

        thread = threading.Thread(target=asks)
        thread.start()
        a.stop_and_forget()
        with a.again() as anew:
            outgoing = ferry.send("t", total_tokens=0)
            assert outgoing.wait(WAIT_S)
            ask.set()
            thread.join()
            assert {type(one) for one in seen} <= {str, type(None)}
            assert ferry.peer_address == anew.address


SPEAKS_ANOTHER = """
from kvferry_proto import versions
versions.agree.__defaults__ = (versions.Versions(low=7, high=9),)
from kvferry_daemon.command import main
main()
"""


class DaemonOfTomorrow(LiveDaemon):
    """A daemon that speaks none of our wire versions."""

    program = ("-c", SPEAKS_ANOTHER)


def test_what_a_daemon_refuses_for_good_is_said_at_once_and_tried_again(tmp_path: Path) -> None:
    """Waiting for a daemon that is there would cost every request the 10 s of one that is not."""
    prefill = Pages()
    with Ferry(tmp_path / "a", prefill.layout, [PagedCache(prefill.layers)]) as ferry:
        waiting = ferry.send("waiting", total_tokens=1)  # from before there was a daemon
        with DaemonOfTomorrow(tmp_path / "a"):
            assert waiting.wait(AT_ONCE_S)
            begun = ferry.send("begun", total_tokens=1)
            assert begun.wait(AT_ONCE_S)
        for side in (waiting, begun):
            assert side.error is not None
            assert side.error.code == "no_common_version"
        with LiveDaemon(tmp_path / "a"):
            assert ferry.wait_until_joined(WAIT_S), ferry.refusal
            table = prefill.take(1)
            after = ferry.send("after", total_tokens=1)
            after.computed([table], 1)
            assert after.wait(WAIT_S)
            assert after.error is None


def test_a_refused_pool_is_waited_for_a_while(tmp_path: Path) -> None:
    """Its daemon may be started again with more room, or others give some back."""
    prefill = Pages()
    with Ferry(tmp_path / "a", prefill.layout, [PagedCache(prefill.layers)]) as ferry:
        with LiveDaemon(tmp_path / "a", pool_tokens=BLOCK):  # less than a window
            wait_for_refusal(ferry, "pool_refused")
            begun = ferry.send("begun", total_tokens=1)
        with LiveDaemon(tmp_path / "a"):
            table = prefill.take(1)
            begun.computed([table], 1)
            assert begun.wait(WAIT_S)
            assert begun.error is None


def wait_for_refusal(ferry: Ferry, code: str) -> None:
    """Until the daemon has said it."""
    until_s = time.monotonic() + WAIT_S
    while ferry.refusal is None or ferry.refusal.code != code:
        assert time.monotonic() < until_s, ferry.refusal
        time.sleep(0.01)


def test_who_will_send_nothing_says_so(a: LiveDaemon, b: LiveDaemon) -> None:
    """Decode waits for it already, and would until a deadline passes."""
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        theirs = decode.take(9)
        incoming = sink.receive("t", source=a.address, tables=[theirs], first_token=0, end_token=9)
        b.wait_for_transfer("t", lambda seen: seen.snapshot.stall == "waiting_for_source")
        withdrawn = source.withdraw("t", "its client went away")
        assert withdrawn.wait(AT_ONCE_S)
        assert incoming.wait(AT_ONCE_S)
        assert "its client went away" in str(incoming.error)
        a.wait_until_free()
        b.wait_until_free()
