"""The contract for engines, over two real daemons, with pages that nobody but us writes."""

from pathlib import Path

import pytest

from engine.pages import Pages, two_engines
from kvferry_client.engine import NO_BLOCK, Ferry, layout_of
from kvferry_client.paged import PagedCache
from live import BLOCK, WAIT_S, WINDOW, LiveDaemon

TOKENS = 5 * WINDOW + 3  # more than a window, and no whole block of either side


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
