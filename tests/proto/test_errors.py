"""Errors: every code has advice, and an error is the same one after it crossed a socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_proto import worker
from kvferry_proto.errors import ADVICE, Code, Fault, FerryError
from kvferry_proto.fields import ErrorInfo

anything = st.text(alphabet=st.characters(categories=["L", "N", "Z", "Cc", "Cs"]), max_size=1500)


def test_every_code_has_advice_and_nothing_else_has() -> None:
    assert list(ADVICE) == list(Code)


@pytest.mark.parametrize("code", Code)
def test_an_error_says_code_words_and_remedy_in_one_line(code: Code) -> None:
    error = FerryError(code, "what was seen")
    assert str(error) == f"{code.value}: what was seen ({ADVICE[code].remedy})"
    assert (error.fault, error.remedy) == (ADVICE[code].fault, ADVICE[code].remedy)
    assert "\n" not in str(FerryError(code, "one\ntwo\r\nthree"))
    assert ADVICE[code].remedy, "an error without a remedy"


@given(code=st.sampled_from(Code), words=anything)
def test_an_error_crosses_a_socket_whatever_its_words(code: Code, words: str) -> None:
    frame = worker.REPLIES.encode(worker.Failure(error=ErrorInfo.of(code, words)))
    reply = worker.REPLIES.decode(frame)
    assert isinstance(reply, worker.Failure)
    error = reply.error.raised()
    assert (error.code, error.fault, error.remedy) == (code, *ADVICE[code])
    printable = words.encode(errors="replace").decode()
    assert error.message == printable[:1024]


def test_a_code_of_a_newer_peer_becomes_internal() -> None:
    newer = ErrorInfo(code="moon_phase", fault="moon", message="waning", remedy="wait")
    error = newer.raised()
    assert error.code is Code.INTERNAL
    assert error.fault is Fault.US
    assert error.message == "moon_phase: waning"
