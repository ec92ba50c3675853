"""Prompts that begin alike and are computed in one step: each is sent as it is, not as it was."""

from collections.abc import Iterator

import pytest

from live import LiveDaemon
from vllm_live.asking import FLAGS, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model
from vllm_live.pair import Pair

pytestmark = pytest.mark.timeout(900)
AT_ONCE = 8
STEP_TOKENS = 2048  # ``max_num_batched_tokens`` of the engines


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("vllm")
    model = make_model(path / "model")
    flags = {**FLAGS, "lease_s": 60}  # decode fetches one after the other
    with (
        LiveDaemon(path / "a", **flags) as a,
        LiveDaemon(path / "b", **flags) as b,
        Engine(path / "prefill.log", model, connector(a.directory)) as prefill,
        Engine(path / "decode.log", model, connector(b.directory)) as decode,
    ):
        yield Pair(a, b, prefill.wait(), decode.wait())


@pytest.mark.parametrize("shared_tokens", [512, 1024])
def test_a_prefix_that_another_request_computes_in_the_same_step(
    scene: Pair, shared_tokens: int
) -> None:
    """vLLM gives all of them the same blocks, before the first of them has written any."""
    shared = prompt(shared_tokens, seed=1)
    prompts = [shared + prompt(60 + n, seed=2) for n in range(AT_ONCE)]
    alone = []
    for one in prompts:
        wait_until(scene.decode.blocks_are_free)  # and nothing is cached
        alone.append(scene.decode.generate(one).tokens)
    wait_until(scene.prefill.blocks_are_free)
    # Fills nine steps meanwhile, and leaves room for all the others in the next: they begin at once.
    busy = scene.prefill.generate(prompt(9 * STEP_TOKENS + 8, seed=3), 1)
    names = [f"shared-{shared_tokens}-{n}" for n in range(AT_ONCE)]
    asked = [
        scene.prefill.generate(one, 1, sending(name))
        for one, name in zip(prompts, names, strict=True)
    ]
    told = [answer.result()["params"] for answer in asked]
    cached = [answer.result()["cached"] for answer in asked]
    assert sorted(cached) == [0] + (AT_ONCE - 1) * [shared_tokens], "or nothing was tried"
    assert busy.result()["reason"] == "length"
    got = []
    for one, params in zip(prompts, told, strict=True):
        wait_until(scene.decode.blocks_are_free)
        got.append(scene.decode.generate(one, params=params).tokens)
    assert got == alone
    scene.check_nothing_is_left()
