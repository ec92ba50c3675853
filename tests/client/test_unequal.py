"""Source and sink groups of different sizes, block sizes and orders: every byte, and every refusal."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.payloads import Daemons
from client.ranks import Ranks
from kvferry_client import Dtype, FerryError, Layout, Plane, connect
from kvferry_proto.layout import Order
from live import LiveDaemon

HEADS, DIM, LATENT = 8, 4, 6
TOKENS = 203  # neither whole blocks nor whole windows
WINDOW_TOKENS = 64  # of a rank


def layout(ranks: int, block: int = 16, order: Order = Order.NHD, heads: int = HEADS) -> Layout:
    """What one rank has: its share of the heads, and the whole of what is no head's."""
    share = max(1, heads // ranks)
    return Layout(
        planes=(
            Plane(
                name="k",
                dtype=Dtype.BFLOAT16,
                shape=(share, DIM),
                heads_total=heads,
                order=order,
            ),
            Plane(
                name="v",
                dtype=Dtype.FLOAT32,
                shape=(share, DIM),
                heads_total=heads,
                order=order,
            ),
            Plane(name="latent", dtype=Dtype.UINT8, shape=(LATENT,)),
            Plane(name="ids", dtype=Dtype.INT64),
        ),
        aux=("first_token",),
        block_size_tokens=block,
    )


def model(heads: int) -> dict[str, np.ndarray]:
    """The payload of all ranks together."""
    rng = np.random.default_rng(heads)
    return {
        "k": rng.integers(0, 1 << 16, (TOKENS, heads, DIM), dtype=np.uint16),
        "v": rng.standard_normal((TOKENS, heads, DIM), dtype=np.float32),
        "latent": rng.integers(0, 256, (TOKENS, LATENT), dtype=np.uint8),
        "ids": np.arange(TOKENS, dtype=np.int64),
    }


def share_of(whole: dict[str, np.ndarray], rank: int, ranks: int) -> dict[str, np.ndarray]:
    """What a rank has of it."""

    def mine(array: np.ndarray) -> np.ndarray:
        heads = array.shape[1]
        first = rank * heads // ranks
        return array[:, first : first + max(1, heads // ranks)]

    return {name: mine(a) if name in ("k", "v") else a for name, a in whole.items()}


def send(
    a: LiveDaemon,
    kind: Layout,
    whole: dict[str, np.ndarray],
    rank: int = 0,
    ranks: int = 1,
    *,
    name: str = "t",
    window_tokens: int = WINDOW_TOKENS,
) -> None:
    with (
        connect(a.directory, kind) as client,
        client.send(name, rank=rank, world_size=ranks, window_tokens=window_tokens) as sending,
    ):
        sending.fill(0, share_of(whole, rank, ranks), {"first_token": 9})
        sending.finish()
        sending.wait(30)


def receive(
    a: LiveDaemon,
    b: LiveDaemon,
    kind: Layout,
    rank: int = 0,
    ranks: int = 1,
    *,
    name: str = "t",
    between: Callable[[], None] = lambda: None,
) -> Any:
    """Every plane, window by window; ``between`` them."""
    parts: dict[str, list[np.ndarray]] = {plane.name: [] for plane in kind.planes}
    with (
        connect(b.directory, kind) as client,
        client.receive(
            name, source=a.address, rank=rank, world_size=ranks, window_tokens=WINDOW_TOKENS
        ) as receiving,
    ):
        for window in receiving:
            for plane, got in parts.items():
                got.append(window.gather(plane))
            between()
        assert receiving.aux == {"first_token": 9}
    return {plane: np.concatenate(got) for plane, got in parts.items()}


def moves(daemons: Daemons, source: Layout, sources: int, sink: Layout, sinks: int) -> None:
    """One payload from one group to the other; every rank's bytes are its share of the whole."""
    a, b = daemons
    whole = model(source.planes[0].heads_total or 1)
    whole = {plane.name: whole[plane.name] for plane in source.planes}
    got: dict[int, Any] = {}

    def take(rank: int) -> None:
        got[rank] = receive(a, b, sink, rank, sinks)

    taking = Ranks(take, sinks)
    Ranks(lambda rank: send(a, source, whole, rank, sources), sources).join()
    taking.join()
    for rank in range(sinks):
        for name, wanted in share_of(whole, rank, sinks).items():
            np.testing.assert_array_equal(got[rank][name], wanted)


@pytest.fixture(params=["two daemons", "one daemon"])
def roomy(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    """Daemons with room for the windows of four ranks; or one that is both."""
    flags = {"pool_tokens": 2 * 4 * 128, "window_tokens": WINDOW_TOKENS}
    names = ("a", "b") if request.param == "two daemons" else ("a",)
    with ExitStack() as stack:
        daemons = [stack.enter_context(LiveDaemon(tmp_path / n, **flags)) for n in names]
        yield daemons[0], daemons[-1]
        for daemon in daemons:
            status = daemon.wait_until_free()
            if len(daemons) == 1:
                assert "bytes_received" not in status.counters
            assert "Traceback" not in daemon.log()


@pytest.mark.parametrize(("sources", "sinks"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4), (4, 2)])
def test_ranks_of_other_numbers(roomy: Daemons, sources: int, sinks: int) -> None:
    moves(roomy, layout(sources), sources, layout(sinks), sinks)


@pytest.mark.parametrize(("block", "other"), [(16, 64), (64, 16)])
@pytest.mark.parametrize(("order", "turned"), [(Order.NHD, Order.HND), (Order.HND, Order.NHD)])
def test_blocks_of_other_sizes_and_orders(
    roomy: Daemons, block: int, other: int, order: Order, turned: Order
) -> None:
    moves(roomy, layout(2, block, order), 2, layout(1, other, turned), 1)


def test_a_window_smaller_than_the_other_sides_block(roomy: Daemons) -> None:
    a, b = roomy
    whole = model(HEADS)
    sending = Ranks(lambda _: send(a, layout(1), whole, window_tokens=16), 1)
    np.testing.assert_array_equal(receive(a, b, layout(1, 64), 0, 1)["v"], whole["v"])
    sending.join()


def test_sources_that_each_have_room_for_less_than_a_block_of_the_sink(tmp_path: Any) -> None:
    """Each waited for the blocks of the others to fill one of the sink's."""
    whole, got = model(HEADS), {}
    flags = {"pool_tokens": 2 * 64, "window_tokens": 64}  # for each role
    with LiveDaemon(tmp_path / "a", **flags) as a, LiveDaemon(tmp_path / "b", **flags) as b:

        def take(number: int) -> None:
            got[number] = receive(a, b, layout(1, 64), name=f"t{number}")

        taking = Ranks(take, 3)
        Ranks(lambda n: send(a, layout(1), whole, name=f"t{n}"), 3).join()
        taking.join()
    for parts in got.values():
        np.testing.assert_array_equal(parts["v"], whole["v"])


def test_heads_before_tokens_on_both_sides(roomy: Daemons) -> None:
    moves(roomy, layout(2, 16, Order.HND), 2, layout(2, 16, Order.HND), 2)


def test_fewer_heads_than_ranks(roomy: Daemons) -> None:
    moves(roomy, layout(4, heads=2), 4, layout(1, heads=2), 1)


@pytest.mark.parametrize(("sources", "sinks"), [(2, 1), (1, 2)])
def test_latents_alone_in_ranks_of_other_numbers(roomy: Daemons, sources: int, sinks: int) -> None:
    """Each rank has the whole payload, so within a daemon all are in one pool."""
    latent = Plane(name="latent", dtype=Dtype.UINT8, shape=(LATENT,))
    kind = Layout(planes=(latent,), aux=("first_token",), block_size_tokens=16)
    moves(roomy, kind, sources, kind, sinks)


REFUSED = {
    "heads of two models": (layout(2), 2, layout(1, heads=4), 1, "heads_total: 8"),
    "no multiple": (layout(1, 16), 1, layout(1, 24), 1, "neither is a multiple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(roomy: Daemons, name: str) -> None:
    a, b = roomy
    source, sources, sink, sinks, why = REFUSED[name]
    errors = []
    with connect(a.directory, source) as one, connect(b.directory, sink) as two:
        sends = [
            one.send("t", rank=rank, world_size=sources, window_tokens=48)
            for rank in range(sources)
        ]
        receives = [
            two.receive("t", source=a.address, rank=rank, world_size=sinks, window_tokens=48)
            for rank in range(sinks)
        ]
        for transfer in (*receives, *sends):
            with pytest.raises(FerryError) as caught:
                transfer.wait(20)
            errors.append((str(caught.value.code), why in caught.value.message))
            transfer.release()
    assert errors == [("layout_mismatch", True)] * sinks + [("sink_failed", True)] * sources


def test_a_rank_whose_layout_is_not_its_share_is_refused_at_once(roomy: Daemons) -> None:
    a, _ = roomy
    with connect(a.directory, layout(2)) as client:
        with pytest.raises(FerryError) as caught:
            client.send("t", rank=0, world_size=4, window_tokens=16)
        assert caught.value.code == "layout_mismatch"
        assert "8 heads over 4 ranks needs 2 a rank, the layout has 4" in caught.value.message


def test_a_source_killed_on_the_way_goes_on_with_other_ranks(tmp_path: Any) -> None:
    """After its restart it does not know the sink's layout any more, and asks for it."""
    flags = {"pool_tokens": 2 * 4 * 128, "window_tokens": WINDOW_TOKENS}
    a, b = LiveDaemon(tmp_path / "a", **flags), LiveDaemon(tmp_path / "b", **flags)
    whole = model(HEADS)
    sending = Ranks(lambda rank: send(a, layout(2), whole, rank, 2), 2)
    parts = []
    with b, connect(b.directory, layout(1, 64)) as client:
        with client.receive("t", source=a.address, window_tokens=WINDOW_TOKENS) as receiving:
            for number, window in enumerate(receiving):
                parts.append(window.gather("v"))
                if number == 0:
                    a.process.kill()
                    a = a.again()
        sending.join()
    with a:
        a.wait_until_free()
    np.testing.assert_array_equal(np.concatenate(parts), whole["v"])


def aligned(order: Order) -> Layout:
    """As many bytes in a slice of every plane as in a whole block of it: only the order differs."""
    planes = tuple(
        Plane(name=name, dtype=Dtype.FLOAT32, shape=(HEADS, DIM), heads_total=HEADS, order=order)
        for name in ("k", "v")
    )
    return Layout(planes=planes, aux=("first_token",), block_size_tokens=16)


SINKS_KILLED = {
    "other ranks": (layout(2), 2, layout(1, 64)),
    "another order, the same size": (aligned(Order.NHD), 1, aligned(Order.HND)),
}


@pytest.mark.parametrize("name", SINKS_KILLED)
def test_a_sink_killed_on_the_way_goes_on_with_what_the_source_is(tmp_path: Any, name: str) -> None:
    """After its restart it must not ask for whole blocks of a source that brings it slices."""
    source, sources, sink = SINKS_KILLED[name]
    flags = {"pool_tokens": 2 * 4 * 128, "window_tokens": WINDOW_TOKENS}
    a, b = LiveDaemon(tmp_path / "a", **flags), LiveDaemon(tmp_path / "b", **flags)
    whole = model(HEADS) | {"k": model(HEADS)["v"] if sources == 1 else model(HEADS)["k"]}
    whole = {plane.name: whole[plane.name] for plane in sink.planes}
    parts = []
    with a, connect(b.directory, sink) as client:
        sending = Ranks(lambda rank: send(a, source, whole, rank, sources), sources)
        with client.receive("t", source=a.address, window_tokens=WINDOW_TOKENS) as receiving:
            for number, window in enumerate(receiving):
                parts.append(window.gather("v"))
                if number == 0:
                    b.process.kill()
                    b = b.again()
        sending.join()
        with b:
            b.wait_until_free()
    np.testing.assert_array_equal(np.concatenate(parts), whole["v"])


def test_groups_of_other_sizes_go_on_after_both_daemons_were_killed(tmp_path: Path) -> None:
    """The next lives know neither the other side's layout nor what came behind a gap."""
    flags = {"pool_tokens": 2 * 4 * 128, "window_tokens": WINDOW_TOKENS, "lost_s": 15.0}
    a, b = LiveDaemon(tmp_path / "a", **flags), LiveDaemon(tmp_path / "b", **flags)
    source, sink, whole = layout(2, 16, Order.HND), layout(1, 64), model(HEADS)
    half_way, restarted = threading.Event(), threading.Event()
    got: dict[str, Any] = {}

    def wait_half_way() -> None:
        if not half_way.is_set():
            half_way.set()
            assert restarted.wait(30)

    sinks = Ranks(lambda _: got.update(receive(a, b, sink, between=wait_half_way)), 1)
    sources = Ranks(lambda rank: send(a, source, whole, rank, 2), 2)
    assert half_way.wait(30)
    for daemon in (a, b):
        daemon.process.kill()
    with a.again() as a_again, b.again() as b_again:
        restarted.set()
        sources.join()
        sinks.join()
        for daemon in (a_again, b_again):
            daemon.wait_until_free()
            assert "Traceback" not in daemon.log()
    for name, wanted in whole.items():
        np.testing.assert_array_equal(got[name], wanted)


def test_copies_within_a_daemon_go_on_after_it_was_killed(tmp_path: Path) -> None:
    """Its next life has both sides in its ledger, and brings them together again."""
    flags = {"pool_tokens": 2 * 4 * 128, "window_tokens": WINDOW_TOKENS, "lost_s": 15.0}
    a = LiveDaemon(tmp_path / "a", **flags)
    source, sink, whole = layout(2, 16, Order.HND), layout(1, 64), model(HEADS)
    half_way, restarted = threading.Event(), threading.Event()
    got: dict[str, Any] = {}

    def wait_half_way() -> None:
        if not half_way.is_set():
            half_way.set()
            assert restarted.wait(30)

    sinks = Ranks(lambda _: got.update(receive(a, a, sink, between=wait_half_way)), 1)
    sources = Ranks(lambda rank: send(a, source, whole, rank, 2), 2)
    assert half_way.wait(30)
    before = a.status().counters["bytes_copied"]
    a.process.kill()
    with a.again() as again:
        restarted.set()
        sources.join()
        sinks.join()
        after = again.wait_until_free().counters["bytes_copied"]
        assert "Traceback" not in again.log()
    for name, wanted in whole.items():
        np.testing.assert_array_equal(got[name], wanted)
    token_bytes = sum(array.nbytes for array in whole.values()) // TOKENS
    assert before >= WINDOW_TOKENS * token_bytes
    assert TOKENS * token_bytes <= before + after <= (TOKENS + WINDOW_TOKENS) * token_bytes
