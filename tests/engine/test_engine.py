"""The contract for engines, over two real daemons, with pages that nobody but us writes."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.pages import Pages, two_engines
from kvferry_client import FerryError
from kvferry_client.engine import NO_BLOCK, Ferry, layout_of
from kvferry_client.engine_sides import Side
from kvferry_client.paged import PagedCache
from live import BLOCK, WAIT_S, WINDOW, LiveDaemon

TOKENS = 5 * WINDOW + 3  # more than a window, and no whole block of either side


@pytest.fixture
def a(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The source's daemon."""
    with LiveDaemon(tmp_path / "a") as daemon:
        yield daemon
        daemon.wait_until_free()
        assert "Traceback" not in daemon.log()


@pytest.fixture
def b(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The sink's daemon."""
    with LiveDaemon(tmp_path / "b") as daemon:
        yield daemon
        daemon.wait_until_free()
        assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("tokens", [1, BLOCK, WINDOW, TOKENS])
@pytest.mark.parametrize("decode_block", [8, 32])
def test_pages_arrive_though_the_engines_cut_them_differently(
    a: LiveDaemon, b: LiveDaemon, tokens: int, decode_block: int
) -> None:
    prefill, decode = Pages(), Pages(decode_block)
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(tokens), decode.take(tokens)
        outgoing = source.send("t", total_tokens=tokens)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=tokens
        )
        for first in range(0, tokens, 50):
            end = min(first + 50, tokens)
            prefill.compute(table, first, end)
            outgoing.computed([table], end)
        assert outgoing.wait(WAIT_S)
        assert incoming.wait(WAIT_S)
        assert outgoing.error is incoming.error is None
        assert incoming.taken_tokens == tokens
        assert decode.wrong(theirs, 0, tokens) == []


def test_prefill_is_free_once_all_is_copied_though_nobody_fetches(tmp_path: Path) -> None:
    prefill = Pages()
    with LiveDaemon(tmp_path / "a") as a, prefill.ferry(a.directory) as source:
        table = prefill.take(WINDOW)
        prefill.compute(table, 0, WINDOW)
        outgoing = source.send("t", total_tokens=WINDOW)
        outgoing.computed([table], WINDOW)
        assert outgoing.wait(WAIT_S)
        assert outgoing.error is None
        assert a.transfers("t")[0].snapshot.available_tokens == WINDOW


def test_only_what_is_missing_is_written(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    have = BLOCK + decode.block_tokens  # whole blocks of the engine, and none of the pool
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        prefill.compute(table, 0, TOKENS)
        decode.compute(theirs, 0, have, request=2)
        source.send("t", total_tokens=TOKENS).computed([table], TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=have, end_token=TOKENS
        )
        assert incoming.wait(WAIT_S)
        assert incoming.error is None
        assert decode.wrong(theirs, 0, have, request=2) == []
        assert decode.wrong(theirs, have, TOKENS) == []
        assert b.transfers("t")[0].snapshot.start_tokens == BLOCK


def test_tokens_without_pages_are_left_out(a: LiveDaemon, b: LiveDaemon) -> None:
    """As in layers that look back a window only: both sides let go of what is behind it."""
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        prefill.compute(table, 0, TOKENS)
        table[0] = table[4] = theirs[0] = theirs[4] = theirs[7] = NO_BLOCK
        source.send("t", total_tokens=TOKENS).computed([table], TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS
        )
        assert incoming.wait(WAIT_S)
        assert incoming.error is None
        assert decode.wrong(theirs, 0, TOKENS) == []


def test_pages_that_are_taken_away_are_read_no_more(a: LiveDaemon, b: LiveDaemon) -> None:
    """A preempted request computes everything anew, in other pages."""
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        outgoing = source.send("t", total_tokens=TOKENS)
        prefill.compute(table, 0, 100)
        outgoing.computed([table], 100)
        a.wait_for_transfer("t", lambda seen: seen.snapshot.available_tokens == WINDOW)
        outgoing.forget()
        prefill.compute(table, 0, TOKENS, request=2)  # another's tokens
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS
        )
        b.wait_for_transfer("t", lambda seen: seen.snapshot.sent_tokens == WINDOW)
        again = prefill.take(TOKENS)
        for end in (50, 200, TOKENS):
            prefill.compute(again, 0, end)
            outgoing.computed([again], end)
        assert incoming.wait(WAIT_S)
        assert incoming.error is None
        assert decode.wrong(theirs, 0, TOKENS) == []


def test_an_abort_of_prefill_ends_both_sides(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        prefill.compute(table, 0, 40)
        outgoing = source.send("t", total_tokens=TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS
        )
        outgoing.computed([table], 40)
        b.wait_for_transfer("t", lambda seen: seen.snapshot.sent_tokens > 0)
        outgoing.abort("the client went away")
        assert outgoing.wait(WAIT_S)
        assert incoming.wait(WAIT_S)
        assert outgoing.error is not None
        assert incoming.error is not None
        assert (outgoing.error.code, incoming.error.code) == ("aborted", "source_failed")
        assert "the client went away" in str(incoming.error)


def test_an_abort_of_decode_frees_prefill(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        outgoing = source.send("t", total_tokens=TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS
        )
        incoming.abort("the client went away")
        assert incoming.wait(WAIT_S)
        assert incoming.error is not None
        assert incoming.error.code == "aborted"
        prefill.compute(table, 0, TOKENS)
        outgoing.computed([table], TOKENS)
        assert outgoing.wait(WAIT_S)
        assert outgoing.error is not None
        assert outgoing.error.code == "sink_failed"


def test_what_nobody_wants_is_let_go_of_at_once(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table = prefill.take(WINDOW)
        prefill.compute(table, 0, WINDOW)
        source.send("t", total_tokens=WINDOW).computed([table], WINDOW)
        a.wait_for_transfer("t", lambda seen: seen.snapshot.available_tokens == WINDOW)
        declined = sink.receive("t", source=a.address, tables=[], first_token=0, end_token=0)
        assert declined.wait(WAIT_S)
        a.wait_until_free()


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
        with LiveDaemon(a.directory, **flags) as new_a, b.again() as new_b:
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


def test_a_failed_attempt_is_tried_again(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        prefill.compute(table, 0, TOKENS, request=2)
        first = source.send("t", total_tokens=TOKENS)
        failed = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS
        )
        first.computed([table], 100)
        b.wait_for_transfer("t", lambda seen: seen.snapshot.sent_tokens > 0)
        prefill.compute(table, 0, TOKENS)
        second = source.send("t", total_tokens=TOKENS, attempt=1)
        second.computed([table], TOKENS)
        assert failed.wait(WAIT_S)
        assert failed.error is not None
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=TOKENS, attempt=1
        )
        assert incoming.wait(WAIT_S)
        assert incoming.error is None
        assert decode.wrong(theirs, 0, TOKENS) == []
        first.computed([table], TOKENS)
        assert first.wait(WAIT_S)
        assert first.error is not None


def test_a_payload_of_another_length_is_an_error(a: LiveDaemon, b: LiveDaemon) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS)
        prefill.compute(table, 0, TOKENS)
        source.send("t", total_tokens=TOKENS).computed([table], TOKENS)
        incoming = sink.receive("t", source=a.address, tables=[theirs], first_token=0, end_token=9)
        assert incoming.wait(WAIT_S)
        assert incoming.error is not None
        assert incoming.error.code == "total_mismatch"
        assert incoming.taken_tokens == 0
        assert decode.wrong(theirs, 0, 9) == []
        assert not decode.layers["latent"].tensor[theirs[2:]].any(), "what is another's was written"


def test_engines_of_different_models_are_told_in_what_they_differ(
    a: LiveDaemon, b: LiveDaemon
) -> None:
    prefill, decode = Pages(), Pages()
    decode.layers["layers.1"] = decode.layers["layers.1"]._replace(
        tensor=decode.layers["layers.1"].tensor.half()
    )
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(9), decode.take(9)
        source.send("t", total_tokens=9).computed([table], 9)
        incoming = sink.receive("t", source=a.address, tables=[theirs], first_token=0, end_token=9)
        assert incoming.wait(WAIT_S)
        assert incoming.error is not None
        assert incoming.error.code == "layout_mismatch"
        assert "layers.1) dtype: float32 at the source, float16 at the sink" in str(incoming.error)


@pytest.mark.parametrize(("told", "needed"), [("one", "two"), (None, "two")])
def test_what_is_of_another_model_is_not_written(
    a: LiveDaemon, b: LiveDaemon, told: str | None, needed: str
) -> None:
    """Or of another prompt: whatever both sides are to tell alike."""
    prefill, decode = Pages(identity=("model",)), Pages(identity=("model",))
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(WINDOW), decode.take(WINDOW)
        prefill.compute(table, 0, WINDOW)
        outgoing = source.send(
            "t", total_tokens=WINDOW, identity={} if told is None else {"model": told}
        )
        outgoing.computed([table], WINDOW)
        incoming = sink.receive(
            "t",
            source=a.address,
            tables=[theirs],
            first_token=0,
            end_token=WINDOW,
            identity={"model": needed},
        )
        assert incoming.wait(WAIT_S)
        assert outgoing.wait(WAIT_S)
        assert incoming.error is not None
        if told is None:  # the source's own mistake: it sends nothing
            assert outgoing.error is not None
            assert outgoing.error.code == "aux_missing"
        else:
            assert incoming.error.code == "payload_mismatch"
            assert "t: model: one at the source, two here" in str(incoming.error)
        assert not any(plane.tensor.any() for plane in decode.layers.values())


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


@pytest.mark.parametrize("least", [TOKENS - 7, TOKENS])
def test_a_length_that_is_told_at_last_and_values_beside_it(
    a: LiveDaemon, b: LiveDaemon, least: int
) -> None:
    """As where an engine counts pages: neither side knows the length, and decode its bounds."""
    prefill, decode = Pages(), Pages()
    layout = layout_of([prefill.layers], block_size_tokens=BLOCK, aux=["next"])
    with (
        Ferry(a.directory, layout, [PagedCache(prefill.layers)]) as source,
        Ferry(b.directory, layout, [PagedCache(decode.layers)]) as sink,
    ):
        table, theirs = prefill.take(TOKENS), decode.take(TOKENS + 7)
        incoming = sink.receive(
            "t",
            source=a.address,
            tables=[theirs],
            first_token=0,
            end_token=TOKENS + 7,
            least_tokens=least,
        )
        outgoing = source.send("t", total_tokens=None)
        prefill.compute(table, 0, TOKENS)
        outgoing.computed([table], WINDOW)
        a.wait_for_transfer("t", lambda seen: seen.snapshot.available_tokens == WINDOW)
        outgoing.computed([table], TOKENS, are_all=True, aux={"next": b"\1\2"})
        assert outgoing.wait(WAIT_S)
        assert incoming.wait(WAIT_S)
        assert outgoing.error is incoming.error is None
        assert incoming.aux == {"next": b"\1\2"}
        assert incoming.taken_tokens == TOKENS
        assert decode.wrong(theirs, 0, TOKENS) == []


def test_a_payload_that_is_shorter_than_it_may_be_is_not_taken_for_this_one(
    a: LiveDaemon, b: LiveDaemon
) -> None:
    prefill, decode = Pages(), Pages()
    with two_engines(a, b, prefill, decode) as (source, sink):
        table, theirs = prefill.take(100), decode.take(100)
        prefill.compute(table, 0, 90)
        outgoing = source.send("t", total_tokens=None)
        outgoing.computed([table], 90, are_all=True)
        incoming = sink.receive(
            "t", source=a.address, tables=[theirs], first_token=0, end_token=100, least_tokens=91
        )
        assert incoming.wait(WAIT_S)
        assert incoming.error is not None
        assert incoming.error.code == "total_mismatch"
