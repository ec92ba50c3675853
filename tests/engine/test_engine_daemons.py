"""Engines whose daemons come late, go, and come back."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.pages import Pages, two_engines
from kvferry_client import FerryError
from kvferry_client.engine import Ferry
from kvferry_client.engine_sides import Side
from kvferry_client.paged import PagedCache
from live import BLOCK, WAIT_S, WINDOW, LiveDaemon

TOKENS = 5 * WINDOW + 3  # more than a window, and no whole block of either side


def test_daemons_that_are_killed_in_the_middle_go_on(tmp_path: Path) -> None:
    a, b = LiveDaemon(tmp_path / "a"), LiveDaemon(tmp_path / "b")
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        outgoing = source.send("t", total_tokens=TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS
        )
        prefill.compute(table, 0, TOKENS)
        outgoing.computed([table], 100)
        b.wait_for_transfer("t", lambda seen: seen.snapshot.sent_tokens > 0)
        flags = {**a.flags, "peer_port": int(a.address.rpartition(":")[2])}
        a.process.kill()
        b.process.kill()
        a.process.wait()
        outgoing.computed([table], TOKENS)
        with ThreadPoolExecutor() as both:  # an engine waits for ten seconds
            starts = both.submit(LiveDaemon, a.directory, **flags), both.submit(b.again)
        with starts[0].result() as new_a, starts[1].result() as new_b:
            assert incoming.wait(WAIT_S)
            assert outgoing.wait(WAIT_S)
            assert outgoing.error is incoming.error is None
            assert decode.wrong(theirs, 0, TOKENS) == []
            new_a.wait_until_free()
            new_b.wait_until_free()
    a.stop()


def test_a_daemon_that_was_away_for_long_gets_its_blocks_back(tmp_path: Path) -> None:
    """The engine is let go of at once when its calls fail; the daemon when it is back."""
    a = LiveDaemon(tmp_path / "a")
    prefill = Pages()
    with prefill.ferry(a.directory) as source:
        table = prefill.take(TOKENS)
        prefill.compute(table, 0, TOKENS)
        outgoing = source.send("t", total_tokens=TOKENS)
        a.wait_for_transfer("t", lambda seen: True)
        a.stop()
        outgoing.computed([table], TOKENS)
        assert outgoing.wait(WAIT_S)
        assert outgoing.error is not None
        assert outgoing.error.code == "daemon_unreachable"
        with a.again() as back:
            (was,) = back.transfers("t")
            assert not was.ended
            back.wait_until_free(2 * WAIT_S)


def test_the_attempt_before_a_retry_is_let_go_of_though_its_opening_was_not_heard(
    tmp_path: Path,
) -> None:
    """A router tries again at once. By then the daemon has both calls to do, one after the other."""
    prefill = Pages()
    with LiveDaemon(tmp_path / "a") as a, prefill.ferry(a.directory) as ferry:
        a.wait_for_workers(1)
        table = prefill.take(TOKENS)
        a.pause()
        first = ferry.send("t", total_tokens=TOKENS)
        assert first.wait(WAIT_S)
        assert first.error is not None
        assert first.error.code == "daemon_unreachable"
        again = ferry.send("t", total_tokens=TOKENS, attempt=1)
        a.resume()
        again.computed([table], TOKENS)
        a.wait_for_transfer("t", lambda seen: seen.snapshot.available_tokens == WINDOW)
        again.abort("that is all")
        assert again.wait(WAIT_S)
        a.wait_until_free()


def test_what_was_aborted_while_its_daemon_stood_still_is_let_go_of(tmp_path: Path) -> None:
    prefill = Pages()
    with LiveDaemon(tmp_path / "a") as a, prefill.ferry(a.directory) as ferry:
        a.wait_for_workers(1)
        a.pause()
        aborted = ferry.send("t", total_tokens=TOKENS)
        for _ in range(3):  # turns of its thread: then the call is out
            turned = threading.Event()
            ferry.tell(turned.set)
            assert turned.wait(WAIT_S)
        aborted.abort("nobody wants it any more")
        assert aborted.wait(WAIT_S)
        after = ferry.send("u", total_tokens=TOKENS)
        assert after.wait(WAIT_S)  # longer than anybody waits who was called before
        a.resume()
        a.wait_for_transfer("u", lambda seen: seen.ended)
        a.wait_for_transfer("t", lambda seen: seen.ended)
        a.wait_until_free()


def test_who_waits_hears_what_was_withdrawn_while_there_was_no_daemon(tmp_path: Path) -> None:
    prefill, decode = Pages(), Pages()
    a = LiveDaemon(tmp_path / "a")
    with prefill.ferry(a.directory) as source:
        a.stop()
        withdrawn = source.withdraw("t", "its request was aborted")
        assert withdrawn.wait(WAIT_S)
        with a.again() as back, decode.ferry(back.directory) as sink:
            incoming = sink.receive(
                "t",
                source=back.address,
                tables=[decode.take(TOKENS)],
                first_token=0,
                end_token=TOKENS,
            )
            assert incoming.wait(WAIT_S)
            assert incoming.error is not None
            assert incoming.error.code == "source_failed"
            assert "its request was aborted" in str(incoming.error)


@pytest.mark.parametrize("role", ["send", "receive"])
def test_a_transfer_whose_opening_was_not_heard_of_is_let_go_of(tmp_path: Path, role: str) -> None:
    """The daemon stood still for longer than the engine waits, and did what it was asked then."""
    prefill = Pages()
    with LiveDaemon(tmp_path / "a") as a, prefill.ferry(a.directory) as ferry:
        a.wait_for_workers(1)
        table = prefill.take(TOKENS)
        a.pause()
        side: Side
        if role == "send":
            side = sending = ferry.send("t", total_tokens=None)
        else:
            side = ferry.receive(
                "t", source=a.address, tables=[table], first_token=0, end_token=TOKENS
            )
        assert side.wait(WAIT_S)
        if role == "send":
            sending.computed([table], TOKENS, are_all=True)  # an engine does not stop at once
        assert side.error is not None
        assert side.error.code == "daemon_unreachable"
        a.resume()
        until_s = time.monotonic() + 2 * WAIT_S
        while sum(a.status().transfers.values()) < 1 or a.status().unsettled:
            assert time.monotonic() < until_s, a.status()
            time.sleep(0.02)


def test_a_daemon_may_come_after_its_engine(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    prefill = Pages()
    with Ferry(directory, prefill.layout, [PagedCache(prefill.layers)]) as ferry:
        table = prefill.take(5)
        outgoing = ferry.send("t", total_tokens=5)
        outgoing.computed([table], 5)
        assert not ferry.wait_until_joined(0.1)
        assert ferry.peer_address is None
        with LiveDaemon(directory) as daemon:
            assert outgoing.wait(WAIT_S)
            assert outgoing.error is None
            assert ferry.peer_address == daemon.address


def test_without_a_daemon_transfers_end_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry_client.engine_thread.JOIN_WAIT_S", 0.2)
    prefill = Pages()
    with Ferry(tmp_path / "a", prefill.layout, [PagedCache(prefill.layers)]) as ferry:
        outgoing = ferry.send("t", total_tokens=5)
        assert outgoing.wait(WAIT_S)
        assert isinstance(outgoing.error, FerryError)
        assert outgoing.error.code == "daemon_unreachable"
        assert str(tmp_path / "a") in str(outgoing.error)


def test_closing_ends_all_that_is_under_way(a: LiveDaemon) -> None:
    prefill = Pages()
    with prefill.ferry(a.directory) as ferry:
        sides = [ferry.send(f"t{number}", total_tokens=9) for number in range(50)]
    assert all(side.error is not None and side.error.code == "aborted" for side in sides)
    a.wait_for_workers(0)
    assert not [one for one in threading.enumerate() if one.name.startswith("kvferry")]


@pytest.mark.timeout(60)
def test_closing_does_not_wait_for_a_daemon_that_is_gone(tmp_path: Path) -> None:
    prefill = Pages()
    with LiveDaemon(tmp_path / "a") as a, prefill.ferry(a.directory) as ferry:
        table = prefill.take(TOKENS)
        outgoing = ferry.send("t", total_tokens=TOKENS)
        outgoing.computed([table], BLOCK)
        a.wait_for_transfer("t", lambda seen: seen.snapshot.available_tokens == BLOCK)
        a.stop()
    assert outgoing.error is not None
    assert outgoing.error.code == "aborted"
