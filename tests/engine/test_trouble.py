"""What goes wrong beside the bytes: daemons that go at the worst moment, engines that say it twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.pages import Pages, two_engines
from live import WAIT_S, WINDOW, LiveDaemon


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
