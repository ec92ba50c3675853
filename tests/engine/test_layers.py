"""Prefill that says plane by plane what is computed: copies begin before the pass is over."""

import time
from pathlib import Path
from typing import Any

import pytest

from engine.pages import Pages, two_engines
from kvferry_client import engine_outgoing
from kvferry_client.engine_pages import Pages as FerryPages
from live import WAIT_S, WINDOW, LiveDaemon

TOKENS = 2 * WINDOW + 3
STALE = 2  # the request that had the pages before


class Scene:
    """One prefill and one decode engine, and prefill's pages full of another request's tokens."""

    def __init__(self, tokens: int) -> None:
        self.prefill, self.decode = Pages(), Pages()
        self.table, self.theirs = self.prefill.take(tokens), self.decode.take(tokens)
        self.prefill.compute(self.table, 0, tokens, STALE)

    def is_in(self, daemon: LiveDaemon, token: int, layer: int, request: int = 1) -> bool:
        """Whether a token of a layer has been copied into a daemon's pool."""
        pool = Path(daemon.status().pools[0].path).read_bytes()
        content = self.prefill.content(token, layer, request)
        one_head = content if content.ndim == 1 else content[0]
        return one_head.numpy().tobytes() in pool

    def wait_until_in(self, daemon: LiveDaemon, token: int, layer: int) -> None:
        until_s = time.monotonic() + WAIT_S
        while not self.is_in(daemon, token, layer):
            assert time.monotonic() < until_s, f"token {token} of layer {layer} is not copied"
            time.sleep(0.01)


def test_a_layer_is_copied_before_the_next_is_computed_and_none_too_early(tmp_path: Path) -> None:
    scene = Scene(TOKENS)
    with (
        LiveDaemon(tmp_path / "a") as a,
        LiveDaemon(tmp_path / "b") as b,
        two_engines(a, b, scene.prefill, scene.decode) as (source, sink),
    ):
        outgoing = source.send("t", total_tokens=TOKENS)
        under_way = source.forward_pass()
        outgoing.computing([scene.table], 0, TOKENS, under_way)
        for layer, name in enumerate(scene.prefill.layers):
            scene.prefill.compute(scene.table, 0, TOKENS, layer=layer)
            under_way.plane_computed(name)
            scene.wait_until_in(a, WINDOW - 1, layer)
            for later in range(layer + 1, len(scene.prefill.layers)):
                assert not scene.is_in(a, 0, later, STALE), "read before it was computed"
        outgoing.computed([scene.table], TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[scene.theirs], first_token=0, end_token=TOKENS
        )
        assert incoming.wait(WAIT_S)
        assert outgoing.wait(WAIT_S)
        assert incoming.error is outgoing.error is None
        assert scene.decode.wrong(scene.theirs, 0, TOKENS) == []


@pytest.mark.parametrize("chunk", [50, 100])
@pytest.mark.parametrize("told", [0, 1, 3])
def test_passes_in_chunks_that_tell_some_of_their_layers(
    tmp_path: Path, chunk: int, told: int
) -> None:
    """A layer that is not told of is copied when the pass is over; some engines tell of none."""
    scene = Scene(TOKENS)
    with (
        LiveDaemon(tmp_path / "a") as a,
        LiveDaemon(tmp_path / "b") as b,
        two_engines(a, b, scene.prefill, scene.decode) as (source, sink),
    ):
        outgoing = source.send("t", total_tokens=TOKENS)
        incoming = sink.receive(
            "t", source=a.address, tables=[scene.theirs], first_token=0, end_token=TOKENS
        )
        for first in range(0, TOKENS, chunk):
            end = min(first + chunk, TOKENS)
            under_way = source.forward_pass()
            outgoing.computing([scene.table], first, end, under_way)
            for layer, name in enumerate(scene.prefill.layers):
                scene.prefill.compute(scene.table, first, end, layer=layer)
                if layer < told:
                    under_way.plane_computed(name)
                    under_way.plane_computed("no layer of this cache")
            outgoing.computed([scene.table], end)
        assert incoming.wait(WAIT_S)
        assert outgoing.wait(WAIT_S)
        assert incoming.error is outgoing.error is None
        assert scene.decode.wrong(scene.theirs, 0, TOKENS) == []


def test_pages_that_are_taken_away_in_the_middle_of_a_pass_are_read_no_more(tmp_path: Path) -> None:
    scene = Scene(TOKENS)
    with (
        LiveDaemon(tmp_path / "a") as a,
        LiveDaemon(tmp_path / "b") as b,
        two_engines(a, b, scene.prefill, scene.decode) as (source, sink),
    ):
        outgoing = source.send("t", total_tokens=TOKENS)
        under_way = source.forward_pass()
        outgoing.computing([scene.table], 0, TOKENS, under_way)
        scene.prefill.compute(scene.table, 0, TOKENS, layer=0)
        under_way.plane_computed("layers.0")
        scene.wait_until_in(a, 0, 0)
        outgoing.forget()
        scene.prefill.compute(scene.table, 0, TOKENS, STALE)
        under_way.plane_computed("layers.1")
        under_way.plane_computed("latent")
        again = scene.prefill.take(TOKENS)
        scene.prefill.compute(again, 0, TOKENS, STALE)
        for first, end in ((0, 20), (20, TOKENS)):  # shorter than the pass that was cut off
            under_way = source.forward_pass()
            outgoing.computing([again], first, end, under_way)
            for layer, name in enumerate(scene.prefill.layers):
                scene.prefill.compute(again, first, end, layer=layer)
                under_way.plane_computed(name)
                if end == 20:
                    scene.wait_until_in(a, 0, layer)
            outgoing.computed([again], end)
        incoming = sink.receive(
            "t", source=a.address, tables=[scene.theirs], first_token=0, end_token=TOKENS
        )
        assert incoming.wait(WAIT_S)
        assert incoming.error is None
        assert scene.decode.wrong(scene.theirs, 0, TOKENS) == []


def test_what_no_layer_told_of_is_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preemption waits for one of them, and the engine with it."""
    monkeypatch.setattr(engine_outgoing, "PIECE_TOKENS", 16)
    copied: list[range] = []

    def copy(pages: Any, tables: Any, window: Any, pool: Any, tokens: range, *, out: bool) -> None:
        copied.append(tokens)
        real(pages, tables, window, pool, tokens, out=out)

    real = FerryPages.copy
    monkeypatch.setattr(FerryPages, "copy", copy)
    scene = Scene(WINDOW)
    with (
        LiveDaemon(tmp_path / "a") as a,
        LiveDaemon(tmp_path / "b") as b,
        two_engines(a, b, scene.prefill, scene.decode) as (source, _sink),
    ):
        outgoing = source.send("t", total_tokens=WINDOW)
        outgoing.computing([scene.table], 0, WINDOW, source.forward_pass())
        until_s = time.monotonic() + WAIT_S
        while outgoing._piece is None:  # it waits for a first plane
            assert time.monotonic() < until_s
            time.sleep(0.01)
        scene.prefill.compute(scene.table, 0, WINDOW)
        outgoing.computed([scene.table], WINDOW)
        assert outgoing.wait(WAIT_S)
    assert [token for piece in copied for token in piece] == list(range(WINDOW))
    assert max(len(piece) for piece in copied) == 16
