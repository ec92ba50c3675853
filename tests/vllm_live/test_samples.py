"""Requests for several samples, and prompts and models that are not what prefill computed."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from live import LiveDaemon
from vllm_live.asking import FLAGS, failed, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.vllm_short]


@dataclass
class Scene:
    """Decode has another model than prefill, of the same shape; elsewhere has a copy of prefill's."""

    a: LiveDaemon
    b: LiveDaemon
    prefill: Engine
    elsewhere: Engine
    other: Engine

    def check_nothing_is_left(self) -> None:
        for engine in (self.prefill, self.elsewhere, self.other):
            wait_until(engine.blocks_are_free)
        self.a.wait_until_free()
        self.b.wait_until_free()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("vllm")
    model, other = make_model(path / "model"), make_model(path / "other", seed=8)
    copy = Path(shutil.copytree(model, path / "copy"))
    with (
        LiveDaemon(path / "a", **FLAGS) as a,
        LiveDaemon(path / "b", **FLAGS) as b,
        Engine(path / "prefill.log", model, connector(a.directory)) as prefill,
        Engine(path / "elsewhere.log", copy, connector(b.directory)) as elsewhere,
        Engine(path / "other.log", other, connector(b.directory)) as another,
    ):
        yield Scene(a, b, prefill.wait(), elsewhere.wait(), another.wait())


def test_several_samples_fetch_once_and_are_those_of_one_engine(scene: Scene) -> None:
    """vLLM makes a request for each sample, with the same params: only one may take the windows."""
    for tokens in (300, 3000):  # no more than the source holds
        asked = prompt(tokens, seed=1)
        told = scene.prefill.generate(asked, 1, sending(f"samples-{tokens}"), n=2).result()
        wait_until(scene.prefill.blocks_are_free)
        got = scene.elsewhere.generate(asked, params=told["params"], n=3).result()
        alone = scene.prefill.generate(asked).tokens
        assert got["samples"] == [alone] * 3
        scene.check_nothing_is_left()


def test_the_same_weights_in_another_place_are_the_same_model(scene: Scene) -> None:
    asked = prompt(400, seed=2)
    told = scene.prefill.generate(asked, 1, sending("copy")).result()
    got = scene.elsewhere.generate(asked, params=told["params"])
    assert got.tokens == scene.prefill.generate(asked).tokens
    scene.check_nothing_is_left()


def test_other_weights_of_the_same_shape_are_told_apart(scene: Scene) -> None:
    asked = prompt(400, seed=3)
    told = scene.prefill.generate(asked, 1, sending("other")).result()
    assert failed(scene.other.generate(asked, params=told["params"]))
    assert re.search(
        r"payload_mismatch: other: model\.weights: \w{16} at the source, \w{16} here",
        scene.other.log(),
    )
    scene.check_nothing_is_left()


def test_another_prompt_of_the_same_length_is_told_apart(scene: Scene) -> None:
    """As a router does that mixes two requests up."""
    told = scene.prefill.generate(prompt(400, seed=4), 1, sending("mixed-up")).result()
    assert failed(scene.elsewhere.generate(prompt(400, seed=5), params=told["params"]))
    assert "payload_mismatch: mixed-up: prompt: " in scene.elsewhere.log()
    scene.check_nothing_is_left()


def test_layers_are_copied_while_the_next_ones_are_computed(scene: Scene) -> None:
    """Of some requests: which ones, the scheduler of a busy machine says."""
    early, before = "vllm:kvferry_sent_planes_early_total", scene.prefill.metrics()
    for tries in range(1, 21):
        told = scene.prefill.generate(
            prompt(4000, seed=tries), 1, sending(f"layers{tries}")
        ).result()
        scene.elsewhere.generate(prompt(4000, seed=tries), params=told["params"]).result()
        wait_until(scene.prefill.blocks_are_free)
        after = scene.prefill.metrics()
        sent = "vllm:kvferry_sent_transfers_total"
        assert after[sent] == before[sent] + tries
        if after[early] > before[early]:
            break
    assert after[early] > before[early]
    assert scene.elsewhere.metrics()["vllm:kvferry_received_tokens_total"] >= 4000
    scene.check_nothing_is_left()
