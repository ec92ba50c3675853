"""Embeddings over two real daemons: a tensor in, the same tensor out."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvferry_client.engine_embeddings import EmbeddingFerry
from live import WAIT_S, LiveDaemon

WIDTH = 24
IDENTITY = {"model.weights": "one"}
FLAGS = {"window_tokens": 256, "pool_tokens": 1024, "lease_s": 2, "stall_s": 4}
CPU = torch.device("cpu")


@pytest.fixture
def a(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The encoder's daemon."""
    with LiveDaemon(tmp_path / "a", **FLAGS) as daemon:
        yield daemon
        daemon.wait_until_free()
        assert "Traceback" not in daemon.log()


@pytest.fixture
def b(tmp_path: Path) -> Iterator[LiveDaemon]:
    """The consumer's daemon."""
    with LiveDaemon(tmp_path / "b", **FLAGS) as daemon:
        yield daemon
        daemon.wait_until_free()
        assert "Traceback" not in daemon.log()


def ferry(
    daemon: LiveDaemon, dtype: str = "float32", identity: dict[str, str] = IDENTITY
) -> EmbeddingFerry:
    return EmbeddingFerry(daemon.directory, dtype, WIDTH, identity, CPU)


def embedding(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 127, 256, 700])
def test_what_comes_out_is_what_went_in(a: LiveDaemon, b: LiveDaemon, tokens: int) -> None:
    """Also where it is longer than a window."""
    with ferry(a) as source, ferry(b) as sink:
        sent = source.send("t", 0, embedding(tokens))
        got = sink.receive("t", 0, a.address, tokens)
        assert got.wait(WAIT_S)
        assert sent.wait(WAIT_S)
        assert sent.error is got.error is None
        assert got.tensor is not None
        assert torch.equal(got.tensor, embedding(tokens))


def test_an_encoders_memory_is_not_kept_for_a_daemon_that_does_not_answer(a: LiveDaemon) -> None:
    with ferry(a) as source:
        assert source.wait_until_joined(WAIT_S)
        a.pause()
        tensor = embedding(5)
        is_there = weakref.ref(tensor)
        sent = source.send("t", 0, tensor)
        del tensor
        assert is_there() is not None
        assert sent.wait(WAIT_S)
        assert sent.error is not None
        assert sent.error.code == "daemon_unreachable"
        assert is_there() is None
        a.resume()
        a.wait_for_transfer("t", lambda seen: seen.ended)


def test_bfloat16_and_slices_of_a_batch_within_one_daemon(a: LiveDaemon) -> None:
    batch = embedding(300).bfloat16()
    with ferry(a, "bfloat16") as both:
        both.send("t", 0, batch[100:250])
        got = both.receive("t", 0, a.address, 150)
        assert got.wait(WAIT_S)
        assert got.tensor is not None
        assert torch.equal(got.tensor, batch[100:250])


def test_another_length_than_is_needed_is_refused(a: LiveDaemon, b: LiveDaemon) -> None:
    with ferry(a) as source, ferry(b) as sink:
        for number, tokens in enumerate((299, 301)):
            source.send(f"t{number}", 0, embedding(300))
            got = sink.receive(f"t{number}", 0, a.address, tokens)
            assert got.wait(WAIT_S)
            assert got.error is not None
            assert got.error.code == "total_mismatch"
            assert got.tensor is None


def test_another_models_embedding_is_refused_by_name(a: LiveDaemon, b: LiveDaemon) -> None:
    with ferry(a) as source, ferry(b, identity={"model.weights": "two"}) as sink:
        source.send("t", 0, embedding(9))
        got = sink.receive("t", 0, a.address, 9)
        assert got.wait(WAIT_S)
        assert got.error is not None
        assert got.error.code == "payload_mismatch"
        assert "model.weights: one at the source, two here" in str(got.error)


def test_an_encode_that_never_was_is_told_at_once(a: LiveDaemon, b: LiveDaemon) -> None:
    """Not after a deadline: its consumer may be waiting already, or come later."""
    with ferry(a) as source, ferry(b) as sink:
        early = sink.receive("t", 0, a.address, 9)
        b.wait_for_transfer("t", lambda seen: True)
        source.send("t", 0, None)
        late = sink.receive("u", 0, a.address, 9)
        source.send("u", 0, None)
        for got in (early, late):
            assert got.wait(WAIT_S)
            assert got.error is not None
            assert got.error.code == "source_failed"
            assert "the encoder did not run" in str(got.error) or "aborted" in str(got.error)


def test_what_nobody_wants_is_let_go_of(a: LiveDaemon, b: LiveDaemon) -> None:
    with ferry(a) as source, ferry(b) as sink:
        source.send("t", 0, embedding(200)).wait(WAIT_S)
        sink.receive("t", 0, a.address, 0)
        a.wait_until_free()


def test_an_abort_before_the_source_has_answered(a: LiveDaemon, b: LiveDaemon) -> None:
    with ferry(a) as source, ferry(b) as sink:
        got = sink.receive("t", 0, a.address, 9)
        b.wait_for_transfer("t", lambda seen: True)
        got.abort("its request is over")
        assert got.wait(WAIT_S)
        assert got.error is not None
        assert got.error.code == "aborted"
        source.send("t", 0, embedding(9))
        a.wait_until_free()
