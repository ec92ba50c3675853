"""What the encoder connector's scheduler side fetches and answers, of steps that vLLM might schedule. No engine."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # what importing vLLM warns of
TOLD = {"transfer_id": "t", "attempt": 0, "source": "tcp://a:1", "dtype": "float32", "width": 64}


@dataclass
class Fetched:
    """What a ferry was asked for; a test says what becomes of it."""

    transfer_id: str
    tokens: int  # none: that the source need not wait
    ended: bool = False
    error: Exception | None = None
    tensor: Any = None

    def arrives(self) -> None:
        self.tensor, self.ended = object(), True

    def fails(self) -> None:
        self.error, self.ended = ConnectionError("nobody has it"), True

    def abort(self, reason: str) -> None:
        self.fails()


@dataclass
class Ferry:
    """All ferries, as far as the scheduler's side uses them."""

    asked: list[Fetched] = field(default_factory=list)

    def of(self, kind: Any) -> "Ferry":
        return self

    def receive(self, transfer_id: str, attempt: int, source: str | None, tokens: int) -> Fetched:
        self.asked.append(Fetched(transfer_id, tokens))
        return self.asked[-1]


def consuming(ferry: Ferry, *, has_media: bool) -> Any:
    """A consumer's scheduler side."""
    from kvferry_client.vllm_encoder_scheduler import Consuming

    return Consuming(ferry, lambda feature: has_media)  # type: ignore[arg-type]


def request(name: str, told: Any, *items: str) -> Any:
    """One of vLLM's, as far as a connector looks at it: each item has 10 tokens."""
    features = [
        SimpleNamespace(
            identifier=item,
            mm_position=SimpleNamespace(offset=20 * place, length=10, get_num_embeds=lambda: 10),
        )
        for place, item in enumerate(items)
    ]
    return SimpleNamespace(request_id=name, ec_transfer_params=told, mm_features=features)


def test_a_request_without_an_item_is_not_scheduled_however_often_vllm_asks() -> None:
    """It may ask several times before it takes the requests that have to fail."""
    ferry = Ferry()
    told = consuming(ferry, has_media=False)
    asked = request("r", {"item": TOLD}, "item")
    assert not told.are_here(asked, 0)
    ferry.asked[0].fails()
    assert [told.are_here(asked, 0) for _ in range(3)] == [False] * 3
    assert told.unavailable == {"r"}
    told.unavailable = set()
    assert not told.are_here(asked, 0)
    assert len(ferry.asked) == 1
    told.finished(asked)
    assert not told.are_here(request("r", {"item": TOLD}, "item"), 0)  # another one, and asked for
    assert len(ferry.asked) == 2


@pytest.mark.parametrize(
    "told",
    [
        {"item": {**TOLD, "width": "64"}},
        {"item": {**TOLD, "width": True}},
        {"item": {**TOLD, "width": 1 << 40}},
        {"item": {**TOLD, "dtype": "float31"}},
        {"item": {**TOLD, "attempt": -1}},
        {"item": {"metadata": {}}},  # of an encoder that never met its daemon
        {"item": "t"},
        {"other": TOLD},
    ],
)
@pytest.mark.parametrize("has_media", [False, True])
def test_an_item_that_no_transfer_can_bring_needs_its_media(told: Any, has_media: bool) -> None:
    ferry = Ferry()
    side = consuming(ferry, has_media=has_media)
    asked = request("r", told, "item")
    assert [side.are_here(asked, 0) for _ in range(2)] == [has_media] * 2
    assert side.unavailable == (set() if has_media else {"r"})
    side.finished(asked)
    assert ferry.asked == []


@pytest.mark.parametrize("told", [None, {}, ["item"], "item"])
def test_a_request_whose_params_tell_nothing_is_left_to_vllm(told: Any) -> None:
    """Which refuses one that has no media then."""
    side = consuming(Ferry(), has_media=False)
    asked = request("r", told, "item")
    assert side.are_here(asked, 0)
    side.finished(asked)


def test_an_item_without_a_transfer_may_be_what_another_request_fetched() -> None:
    ferry = Ferry()
    told = consuming(ferry, has_media=False)
    told.are_here(request("first", {"item": TOLD}, "item"), 0)
    ferry.asked[0].arrives()
    assert told.are_here(request("second", None, "item"), 0)


def test_a_request_with_media_encodes_what_cannot_be_fetched() -> None:
    ferry = Ferry()
    told = consuming(ferry, has_media=True)
    asked = request("r", {"item": TOLD}, "item")
    told.are_here(asked, 0)
    ferry.asked[0].fails()
    assert [told.are_here(asked, 0) for _ in range(2)] == [True] * 2
    assert told.unavailable == set()


def test_an_item_that_a_prefix_cache_covers_can_be_had_after_a_preemption() -> None:
    """The blocks that covered it may be another's by then; its source waits until the request ends."""
    ferry = Ferry()
    told = consuming(ferry, has_media=False)
    asked = request("r", {"item": TOLD}, "item")
    assert told.are_here(asked, 10)
    assert ferry.asked == []
    assert not told.are_here(asked, 0)
    (fetched,) = ferry.asked
    assert fetched.tokens == 10
    fetched.arrives()
    assert told.are_here(asked, 0)
    told.finished(asked)
    assert len(ferry.asked) == 1


def test_the_source_of_what_was_never_fetched_is_told_when_the_last_request_ends() -> None:
    """Samples of one request share its transfers."""
    ferry = Ferry()
    told = consuming(ferry, has_media=False)
    samples = [request(name, {"item": TOLD}, "item") for name in ("one", "two")]
    for sample in samples:
        assert told.are_here(sample, 10)
    told.finished(samples[0])
    assert ferry.asked == []
    told.finished(samples[1])
    assert [one.tokens for one in ferry.asked] == [0]


def test_what_one_sample_fetched_stays_for_another_that_a_prefix_cache_covers() -> None:
    ferry = Ferry()
    told = consuming(ferry, has_media=False)
    first, second = (request(name, {"item": TOLD}, "item") for name in ("one", "two"))
    assert not told.are_here(first, 0)
    ferry.asked[0].arrives()
    assert told.are_here(first, 0)
    assert told.are_here(second, 10)
    told.finished(first)
    assert told.are_here(second, 0)  # preempted
    told.finished(second)
    assert len(ferry.asked) == 1


def test_the_source_of_a_request_that_ends_in_the_queue_is_told() -> None:
    ferry = Ferry()
    consuming(ferry, has_media=False).finished(request("r", {"item": TOLD}, "item"))
    assert [one.tokens for one in ferry.asked] == [0]


def test_preempted_requests_that_hold_an_item_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What their prefix cache covered is to be fetched now, and there is no room for it."""
    monkeypatch.setattr("kvferry_client.vllm_encoder_scheduler.HELD_TOKENS_MAX", 20)
    ferry = Ferry()
    told = consuming(ferry, has_media=False)
    both = [
        request(name, {item: {**TOLD, "transfer_id": name + item} for item in "ab"}, "a", "b")
        for name in ("one", "two")
    ]
    for asked in both:
        assert not told.are_here(asked, 10)
    assert not told.are_here(request("three", {"c": {**TOLD, "transfer_id": "c"}}, "c"), 0)
    assert [one.transfer_id for one in ferry.asked] == ["oneb", "twob"]
    for asked in both:
        assert not told.are_here(asked, 0)
    for one in ferry.asked:
        one.arrives()
    assert all(told.are_here(asked, 0) for asked in both)
