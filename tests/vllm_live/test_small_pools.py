"""Daemons whose pools are too small for what is asked at once, on either side."""

from collections.abc import Iterator

import pytest

from live import LiveDaemon
from vllm_live.asking import failed, fetching, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model
from vllm_live.pair import Pair

pytestmark = pytest.mark.timeout(900)
AT_ONCE = 12
HOLDERS = 2  # their windows are a half
TOKENS = 1500  # a request's; a role's half of a pool has 1024
FLAGS = {"window_tokens": 512, "pool_tokens": 2048, "lease_s": 8}
STALL_S = {"a": 8, "b": 16}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("vllm")
    model = make_model(path / "model")
    with (
        LiveDaemon(path / "a", **FLAGS, stall_s=STALL_S["a"]) as a,
        LiveDaemon(path / "b", **FLAGS, stall_s=STALL_S["b"]) as b,
        Engine(path / "prefill.log", model, connector(a.directory, policy="recompute")) as prefill,
        Engine(path / "decode.log", model, connector(b.directory)) as decode,
    ):
        yield Pair(a, b, prefill.wait(), decode.wait())


def test_more_requests_than_the_pools_hold_take_turns(scene: Pair) -> None:
    """Both engines are asked for all at once; windows slide through what there is."""
    prompts = [prompt(TOKENS, seed=number) for number in range(AT_ONCE)]
    alone = [answer.tokens for answer in [scene.decode.generate(one) for one in prompts]]
    wait_until(scene.decode.blocks_are_free)
    answers = []
    for number, one in enumerate(prompts):
        scene.prefill.generate(one, 1, sending(f"turn-{number}"))
        answers.append(scene.decode.generate(one, params=fetching(f"turn-{number}", scene.a)))
    assert [answer.tokens for answer in answers] == alone
    scene.check_nothing_is_left()


def hold(engine: Engine, daemon: LiveDaemon, name: str) -> None:
    """Fill the source's half of a pool with windows that nobody fetches."""
    for number in range(HOLDERS):
        engine.generate(prompt(900, seed=number), 1, sending(f"{name}-{number}"))
    for number in range(HOLDERS):
        daemon.wait_for_transfer(
            f"{name}-{number}", lambda seen: seen.snapshot.available_tokens == 512
        )


def test_what_nobody_fetches_keeps_others_out_no_longer_than_its_deadline(scene: Pair) -> None:
    """What waits for room meanwhile is served then, since its own deadline is later."""
    hold(scene.prefill, scene.a, "left")
    scene.a.wait_for_transfer("left-0", lambda seen: seen.idle_s > STALL_S["a"] / 2)
    asked = prompt(900, seed=99)
    scene.prefill.generate(asked, 1, sending("wanted"))
    got = scene.decode.generate(asked, params=fetching("wanted", scene.a)).tokens
    (sink,) = scene.b.transfers("wanted")
    assert sink.snapshot.sent_tokens >= len(asked)
    scene.check_nothing_is_left()
    assert got == scene.decode.generate(asked).tokens
    wait_until(scene.decode.blocks_are_free)
    asked = prompt(TOKENS, seed=100)
    scene.prefill.generate(asked, 1, sending("after"))
    got = scene.decode.generate(asked, params=fetching("after", scene.a)).tokens
    wait_until(scene.decode.blocks_are_free)
    assert got == scene.decode.generate(asked).tokens


def test_what_waits_for_a_sources_room_longer_than_its_deadline_is_computed(scene: Pair) -> None:
    """The other way round: daemon b holds what nobody fetches longer than daemon a waits."""
    hold(scene.decode, scene.b, "held")
    asked = prompt(900, seed=101)
    scene.decode.generate(asked, 1, sending("too-late"))
    got = scene.prefill.generate(asked, params=fetching("too-late", scene.b)).tokens
    (sink,) = scene.a.transfers("too-late")
    assert sink.snapshot.error is not None
    assert sink.snapshot.error.code == "stalled"
    assert sink.snapshot.sent_tokens == 0
    scene.check_nothing_is_left()
    assert got == scene.decode.generate(asked).tokens
    scene.check_nothing_is_left()


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_sinks_without_room_end_as_the_policy_says_and_leave_nothing(
    scene: Pair, policy: str
) -> None:
    """The first ones hold the sinks' half, since their source stands still. Prefill recomputes."""
    is_fail = policy == "fail"
    engine, sinks = (scene.decode, scene.b) if is_fail else (scene.prefill, scene.a)
    source = scene.a if is_fail else scene.b
    prompts = [prompt(900, seed=n) for n in range(AT_ONCE)]
    alone = [answer.tokens for answer in [scene.decode.generate(one) for one in prompts]]
    scene.check_nothing_is_left()
    source.pause()
    stuck = [
        engine.generate(one, params=fetching(f"stuck-{policy}-{n}", source))
        for n, one in enumerate(prompts)
    ]
    sinks.wait_for_transfer(f"stuck-{policy}-0", lambda seen: True)
    if is_fail:
        assert all(failed(answer) for answer in stuck)
    else:
        assert [answer.tokens for answer in stuck] == alone
    source.resume()
    for n in range(AT_ONCE):
        assert f"transfer stuck-{policy}-{n}, attempt 0, was not received" in engine.log()
    scene.check_nothing_is_left()
