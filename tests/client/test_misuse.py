"""What a worker may get wrong: every mistake has a code, names itself, and changes nothing."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from client.payloads import BLOCK, LAYOUT, Daemons, payload
from kvferry_client import AsyncClient, Client, Code, FerryError, Mode, Role, Sending, connect
from kvferry_proto import worker

WATCHED = worker.Watched(role=Role.SOURCE, transfer_id="t")


def code_of(act: Callable[[], Any]) -> Code:
    with pytest.raises(FerryError) as caught:
        act()
    return caught.value.code


CALLS: dict[str, Callable[[Client], Any]] = {
    "an id with a blank": lambda c: c.send("a b"),
    "an attempt below 0": lambda c: c.send("u", attempt=-1),
    "aux that is not finite": lambda c: c.send("u", aux={"first_token": float("nan")}),
    "whole mode without a limit": lambda c: c.receive("u", mode=Mode.WHOLE),
    "a poll of nothing": lambda c: c.poll(),
    "a poll that waits too long": lambda c: c.poll(WATCHED, wait_s=1e6),
}


@pytest.mark.parametrize("act", CALLS.values(), ids=CALLS)
def test_a_call_that_cannot_be_is_a_bad_message(
    daemons: Daemons, act: Callable[[Client], Any]
) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        assert code_of(lambda: act(client)) == "bad_message"
        assert daemons[0].transfers("u") == []


def test_numbers_of_numpy_are_numbers(daemons: Daemons) -> None:
    ready: Any = np.int64(BLOCK)
    with connect(daemons[0].directory, LAYOUT) as client:
        sending = client.send("t")
        next(sending.windows())
        sending.ready(ready, aux={"first_token": 1})
        assert sending.snapshot.available_tokens == BLOCK
        sending.abort()


def changed(**arrays: Any) -> dict[str, Any]:
    return {**payload(8), **arrays}


ARRAYS: dict[str, dict[str, Any]] = {
    "floats for raw bits": changed(bf=np.full((8, 4), 1.5, np.float32)),
    "float64 for float32": changed(k=np.zeros((8, 2, 3))),
    "a shape that would broadcast": changed(k=np.zeros((8, 1, 3), np.float32)),
    "too few tokens of a plane": changed(ids=np.arange(3)),
    "too many tokens of a plane": changed(ids=np.arange(20)),
    "no array": changed(ids=[1, 2, 3, 4, 5, 6, 7, 8]),
    "a tensor of another dtype": changed(bf=torch.zeros((8, 4), dtype=torch.float16)),
    "a plane is missing": {"ids": np.arange(8)},
    "a plane is unknown": changed(more=np.arange(8)),
}


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_not_the_planes_are_refused_before_a_byte(
    daemons: Daemons, arrays: dict[str, Any]
) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        sending = client.send("t")
        assert code_of(lambda: sending.fill(0, arrays)) == "bad_array"
        window = next(sending.windows())
        assert sending.snapshot.available_tokens == 0
        for plane in LAYOUT.planes:
            assert not any(part.any() for part in window.numpy_runs(plane.name))
        sending.abort()


def filled(sending: Sending) -> dict[str, np.ndarray]:
    arrays = payload(BLOCK)
    sending.fill(0, arrays, aux={"first_token": 1})
    return arrays


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((BLOCK, 2, 3), np.float16),
        np.zeros((8, 8, 2, 3), np.float32),
        np.zeros((BLOCK - 1, 2, 3), np.float32),
        torch.zeros((BLOCK, 2, 3), dtype=torch.bfloat16),
    ],
    ids=["dtype", "shape", "tokens", "tensor"],
)
def test_a_gather_into_what_does_not_fit_is_refused(daemons: Daemons, out: Any) -> None:
    a, b = daemons
    with connect(a.directory, LAYOUT) as source, connect(b.directory, LAYOUT) as sink:
        with source.send("t") as sending:
            filled(sending)
        with sink.receive("t", source=a.address) as receiving:
            (window,) = receiving
            assert code_of(lambda: window.gather("k", out)) == "bad_array"
            assert code_of(lambda: window.gather("l", out)) == "bad_array"


def test_tensors_go_in_and_out_as_they_are(daemons: Daemons) -> None:
    a, b = daemons
    bf = torch.randn((BLOCK, 4)).to(torch.bfloat16)
    with connect(a.directory, LAYOUT) as source, connect(b.directory, LAYOUT) as sink:
        with source.send("t") as sending:
            arrays = {**payload(BLOCK), "bf": bf, "k": torch.ones((BLOCK, 2, 3))}
            sending.fill(0, arrays, aux={"first_token": 1})
        with sink.receive("t", source=a.address) as receiving:
            (window,) = receiving
            out = torch.zeros((BLOCK, 4), dtype=torch.bfloat16)
            assert window.gather("bf", out) is out
            assert torch.equal(out, bf)


def test_views_are_the_pool_itself_and_no_copies(daemons: Daemons) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        sending = client.send("t")
        window = next(sending.windows())
        window.numpy_runs("ids")[0][0, 3] = 77
        assert window.torch_runs("ids")[0][0, 3] == 77
        assert window.gather("ids")[3] == 77
        window.torch_runs("bf")[0][0, 0] = 1.0
        assert window.numpy_runs("bf")[0][0, 0, 0] == 0x3F80
        sending.abort()


def test_an_exceptions_text_is_a_reason_whatever_it_holds(daemons: Daemons) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        with pytest.raises(OSError, match="bad name"), client.send("t"):
            raise OSError("bad name \udcff" + "x" * 5000)
        [row] = daemons[0].transfers("t")
        assert row.snapshot.error is not None
        assert row.snapshot.error.code == "aborted"


def test_a_closed_client_says_so(daemons: Daemons) -> None:
    client = connect(daemons[0].directory, LAYOUT)
    sending = client.send("t")
    client.close()
    client.close()  # twice is once
    assert code_of(lambda: client.poll(WATCHED)) == "client_closed"
    assert code_of(lambda: sending.ready(1)) == "client_closed"


def test_a_forked_child_is_refused(daemons: Daemons) -> None:
    with connect(daemons[0].directory, LAYOUT) as client:
        child = os.fork()
        if child == 0:
            try:
                client.poll(WATCHED)
            except FerryError as error:
                os._exit(0 if "fork" in error.message else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_an_asyncio_client_that_is_not_open_says_so(daemons: Daemons) -> None:
    client = AsyncClient(daemons[0].directory, LAYOUT)
    assert code_of(lambda: asyncio.run(client.poll(WATCHED))) == "client_closed"
