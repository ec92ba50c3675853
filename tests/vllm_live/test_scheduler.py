"""What the connector's scheduler side tells the workers, of steps that vLLM might schedule. No engine."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_live.asking import prompt, sending

pytestmark = pytest.mark.filterwarnings("ignore")  # what importing vLLM warns of
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass
class Step:
    """One of vLLM's, as far as a connector looks at it."""

    new: dict[str, int] = field(default_factory=dict)  # how many tokens count as computed
    cached: dict[str, int] = field(default_factory=dict)  # the same of requests known before
    tokens: dict[str, int] = field(default_factory=dict)  # that it computes
    preempted: set[str] = field(default_factory=set)
    tables: dict[str, tuple[list[int], ...]] = field(default_factory=dict)

    @property
    def output(self) -> Any:
        """Named as in vLLM's SchedulerOutput."""
        return SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, num_computed_tokens=tokens)
                for name, tokens in self.new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(self.cached), num_computed_tokens=list(self.cached.values())
            ),
            num_scheduled_tokens=self.tokens,
            preempted_req_ids=self.preempted,
            kv_connector_block_state=SimpleNamespace(get_block_ids=self._blocks),
        )

    def _blocks(self, name: str) -> tuple[list[int], ...]:
        return self.tables.get(name, (list(range(1, 10)),) * 2)


def side(groups: int = 1, *, keeps_blocks: bool = True) -> Any:
    """A scheduler side that has met its daemon."""
    from kvferry_client.vllm_scheduler import SchedulerSide

    made = SchedulerSide(tuple(range(groups)), keeps_blocks=keeps_blocks)
    made.peer_address = "tcp://127.0.0.1:1"
    return made


def request(
    name: str,
    tokens: int,
    params: dict[str, Any],
    max_tokens: int = 1,
    headers: dict[str, str] | None = None,
) -> Any:
    """vLLM's own, of so many tokens."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=max_tokens, extra_args={"kv_transfer_params": params})
    return Request(name, prompt(tokens), sampling, None, trace_headers=headers)


def finished(told: Any, asked: Any) -> Any:
    """What the router is told of a request that was served."""
    from vllm.v1.request import RequestStatus

    asked.status = RequestStatus.FINISHED_LENGTH_CAPPED
    return told.finished(asked)


def spans(told: Any, step: Step) -> dict[str, tuple[int, int]]:
    """Of each request that is sent: the first token that is not in its pages yet, and the last one."""
    saves = told.step(step.output).saves
    return {name: (save.first_token, save.computed_tokens) for name, save in saves.items()}


def test_a_prefix_that_this_very_step_computes_is_not_told_as_computed() -> None:
    """vLLM's prefix cache has a block as soon as a step that will write it is scheduled."""
    told = side()
    for name in ("first", "second"):
        told.new_request(request(name, 600, sending(name)))
    step = Step(new={"first": 0, "second": 512}, tokens={"first": 600, "second": 88})
    assert spans(told, step) == {"first": (0, 600), "second": (0, 600)}


def test_what_earlier_steps_computed_is_told_as_computed() -> None:
    told = side()
    told.new_request(request("t", 900, sending("t")))
    assert spans(told, Step(new={"t": 256}, tokens={"t": 200})) == {"t": (0, 456)}
    assert spans(told, Step(cached={"t": 456}, tokens={"t": 200})) == {"t": (456, 656)}
    assert spans(told, Step(cached={"t": 656}, tokens={"t": 244})) == {"t": (656, 900)}
    assert spans(told, Step(cached={"t": 900}, tokens={"t": 1})) == {}


def test_after_a_preemption_nothing_counts_as_computed() -> None:
    """What the prefix cache gives back may be written in the same step, by another request."""
    told = side()
    told.new_request(request("t", 900, sending("t")))
    told.step(Step(new={"t": 0}, tokens={"t": 400}).output)
    away = Step(preempted={"t"})
    assert told.step(away.output).preempted == {"t"}
    assert spans(told, Step(cached={"t": 384}, tokens={"t": 516})) == {"t": (0, 900)}


def test_a_request_that_generates_on_is_not_sent_where_blocks_are_let_go_of_meanwhile() -> None:
    """A sliding window's blocks are another's before they are copied: nobody would notice."""
    told = side(groups=2, keeps_blocks=False)
    for name, max_tokens in (("one", 1), ("more", 2)):
        asked = request(name, 600, sending(name), max_tokens)
        told.new_request(asked)
        sent = spans(told, Step(new={name: 0}, tokens={name: 600}))
        assert sent == ({"one": (0, 600)} if name == "one" else {})
        is_held, params = finished(told, asked)
        assert is_held is (name == "one")
        assert (params is None) is (name == "more")


def test_a_decode_that_waits_for_a_prompt_which_is_never_computed_is_told() -> None:
    """Aborted in the queue: no worker has heard of it, and decode may have been asked already."""
    from vllm.v1.request import RequestStatus

    told = side()
    for name in ("begun", "queued"):
        told.new_request(asked := request(name, 600, sending(name)))
        if name == "begun":
            told.step(Step(new={name: 0}, tokens={name: 300}).output)
        asked.status = RequestStatus.FINISHED_ABORTED
        assert told.finished(asked) == (name == "begun", None)
    meta = told.step(Step().output)
    assert [(transfer.transfer_id, why) for transfer, why in meta.withdrawn] == [
        ("queued", "request queued: finished_aborted")
    ]
    assert list(meta.aborts) == ["begun"]
    assert told.step(Step().output).withdrawn == []


def test_a_decode_that_waits_for_what_a_sliding_window_forbids_is_told() -> None:
    told = side(groups=2, keeps_blocks=False)
    told.new_request(request("more", 600, sending("more", attempt=3), 2))
    ((transfer, why),) = told.step(Step().output).withdrawn
    assert transfer[:2] == ("more", 3)
    assert "max_tokens is 2" in why


def test_what_could_not_be_sent_is_not_told_to_decode() -> None:
    """Such as at a daemon that drains: its decode would wait for what nobody has."""
    from kvferry_client.vllm_messages import News

    told = side()
    asked = {name: request(name, 600, sending(name)) for name in ("lost", "sent")}
    for one in asked.values():
        told.new_request(one)
    told.step(Step(new=dict.fromkeys(asked, 0), tokens=dict.fromkeys(asked, 600)).output)
    ranks = News(None, {"lost", "nobody's"}), News("tcp://127.0.0.1:2", set())
    news = ranks[0].aggregate(ranks[1])
    told.worked(SimpleNamespace(finished_recving=None, kv_connector_worker_meta=news))
    assert finished(told, asked["lost"]) == (True, None)
    is_held, params = finished(told, asked["sent"])
    assert is_held
    assert params["source"] == "tcp://127.0.0.1:2"


def test_nor_are_the_other_samples_of_the_same_request() -> None:
    """vLLM answers with the params of the sample that ends last."""
    from kvferry_client.vllm_messages import News

    told = side()
    asked = [request(name, 600, sending("t")) for name in ("0_t", "1_t")]
    for one in asked:
        told.new_request(one)
    told.step(Step(new={"0_t": 0, "1_t": 512}, tokens={"0_t": 600, "1_t": 88}).output)
    news = News(None, {"0_t"})
    told.worked(SimpleNamespace(finished_recving=None, kv_connector_worker_meta=news))
    assert [finished(told, one)[1] for one in asked] == [None, None]


def test_an_engine_in_the_middle_that_drops_a_request_tells_both_sides() -> None:
    """It would have fetched from one and sent to another."""
    from vllm.v1.request import RequestStatus

    told = side()
    params = {**sending("t"), "do_remote_prefill": True, "source": "tcp://127.0.0.1:9"}
    told.new_request(asked := request("r", 600, params))
    asked.status = RequestStatus.FINISHED_ABORTED
    assert told.finished(asked) == (False, None)
    meta = told.step(Step().output)
    assert [transfer.transfer_id for transfer in meta.declined] == ["t"]
    assert [transfer.transfer_id for transfer, _ in meta.withdrawn] == ["t"]


def test_a_request_that_generates_on_is_sent_where_blocks_stay() -> None:
    told = side()
    asked = request("more", 600, sending("more"), 2)
    told.new_request(asked)
    assert spans(told, Step(new={"more": 0}, tokens={"more": 600})) == {"more": (0, 600)}
    assert finished(told, asked)[0]


def test_what_vllm_stops_as_a_repetition_is_complete() -> None:
    from vllm.v1.request import RequestStatus

    told = side()
    asked = request("t", 600, sending("t"), 9)
    told.new_request(asked)
    told.step(Step(new={"t": 0}, tokens={"t": 600}).output)
    asked.status = RequestStatus.FINISHED_REPETITION
    _, params = told.finished(asked)
    assert params["do_remote_prefill"]


def test_samples_that_share_their_params_fetch_once_and_leave_them_as_they_are() -> None:
    told = side()
    params = {**sending("t"), "do_remote_decode": False, "do_remote_prefill": True}
    first, second = (request(name, 600, params) for name in ("first", "second"))
    for asked in (first, second):
        asked.kv_transfer_params = params
        told.new_request(asked)
    assert told.matched(first, 0) == (600, True)
    assert told.matched(second, 0) == (0, False)
    told.allocated(first, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4, 5],)), 600)
    assert told.matched(second, 0) == (None, False)
    assert told.matched(first, 0) == (0, False)  # once only
    meta = told.step(Step().output)
    assert set(meta.loads) == {"first"}
    assert finished(told, second) == (False, None)
    assert told.step(Step().output).declined == []
    assert params["do_remote_prefill"]


@pytest.mark.parametrize("way", ["params", "header", "neither"])
def test_a_routers_trace_goes_to_the_workers_and_on_to_decode(way: str) -> None:
    told = side()
    params = sending("t") | ({"traceparent": TRACE} if way == "params" else {})
    headers = {"traceparent": TRACE} if way == "header" else None
    asked = request("t", 600, params, headers=headers)
    told.new_request(asked)
    meta = told.step(Step(new={"t": 0}, tokens={"t": 600}).output)
    expected = None if way == "neither" else TRACE
    assert meta.saves["t"].transfer.traceparent == expected
    _, answered = finished(told, asked)
    assert answered.get("traceparent") == expected
    fetching = request("d", 600, answered)
    told.new_request(fetching)
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4, 5],))
    told.allocated(fetching, blocks, 600)
    assert told.step(Step().output).loads["d"].transfer.traceparent == expected


def test_a_sliding_window_lets_go_of_blocks_and_full_attention_does_not() -> None:
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    )

    from kvferry_client.vllm_cache import keeps_all_blocks

    shape: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=64)
    unlike = {"a": full, "b": window}
    for specs, expected in (
        ([full], True),
        ([full, window], False),
        ([window], False),
        ([UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": full, "b": full})], True),
        ([UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=unlike)], False),
    ):
        groups = [KVCacheGroupSpec([f"layer.{n}"], spec) for n, spec in enumerate(specs)]
        config = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)
        assert keeps_all_blocks(config) is expected, specs
