"""Daemons whose pools are too small for what is asked at once, on either side."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from live import LiveDaemon
from vllm_live.asking import fetching, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model

pytestmark = pytest.mark.timeout(900)
AT_ONCE = 12
TOKENS = 1500  # a request's; a role's half of a pool has 1024
FLAGS = {"window_tokens": 512, "pool_tokens": 2048, "lease_s": 8, "stall_s": 8}


@dataclass
class Scene:
    """Prefill recomputes what it cannot load, and decode fails it, as in test_vllm."""

    a: LiveDaemon
    b: LiveDaemon
    prefill: Engine
    decode: Engine

    def check_nothing_is_left(self) -> None:
        wait_until(self.prefill.blocks_are_free)
        wait_until(self.decode.blocks_are_free)
        self.a.wait_until_free()
        self.b.wait_until_free()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("vllm")
    model = make_model(path / "model")
    with (
        LiveDaemon(path / "a", **FLAGS) as a,
        LiveDaemon(path / "b", **FLAGS) as b,
        Engine(path / "prefill.log", model, connector(a.directory, policy="recompute")) as prefill,
        Engine(path / "decode.log", model, connector(b.directory)) as decode,
    ):
        yield Scene(a, b, prefill.wait(), decode.wait())


def test_more_requests_than_the_pools_hold_take_turns(scene: Scene) -> None:
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


def test_requests_that_nobody_fetches_keep_others_out_no_longer_than_their_deadline(
    scene: Scene,
) -> None:
    """Their windows fill the source's half; what waits for room fails or is served, by policy."""
    for number in range(AT_ONCE):
        scene.prefill.generate(prompt(900, seed=number), 1, sending(f"left-{number}"))
    asked = prompt(900, seed=99)
    scene.prefill.generate(asked, 1, sending("wanted"))
    answer = scene.decode.generate(asked, params=fetching("wanted", scene.a)).result()
    served = answer.get("reason") == "length"
    if served:
        wait_until(scene.decode.blocks_are_free)
        assert answer["tokens"] == scene.decode.generate(asked).tokens
    else:
        assert "was not received" in scene.decode.log()
    scene.check_nothing_is_left()
    asked = prompt(TOKENS, seed=100)
    scene.prefill.generate(asked, 1, sending("after"))
    got = scene.decode.generate(asked, params=fetching("after", scene.a)).tokens
    wait_until(scene.decode.blocks_are_free)
    assert got == scene.decode.generate(asked).tokens


def test_a_sink_without_room_recomputes_or_fails_and_leaves_nothing(scene: Scene) -> None:
    """Sinks hold the decode side's half, since their source stands still."""
    scene.a.pause()
    stuck = [
        scene.decode.generate(prompt(900, seed=n), params=fetching(f"stuck-{n}", scene.a))
        for n in range(AT_ONCE)
    ]
    scene.b.wait_for_transfer("stuck-0", lambda seen: True)
    outcomes = [answer.result() for answer in stuck]
    assert all(said.get("reason") == "error" or "error" in said for said in outcomes)
    scene.a.resume()
    scene.check_nothing_is_left()
