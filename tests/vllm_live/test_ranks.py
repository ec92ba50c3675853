"""Engines with different numbers of tensor-parallel ranks hand prompts over, both ways."""

from pathlib import Path

import pytest

from live import LiveDaemon
from vllm_live.asking import FLAGS, failed, fetching, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model

pytestmark = pytest.mark.timeout(900)
PATIENT = {**FLAGS, "lease_s": 60, "stall_s": 60}  # two ranks that meet take seconds on two cores


def test_two_ranks_and_one_hand_over_both_ways(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with (
        LiveDaemon(tmp_path / "a", **PATIENT) as a,
        LiveDaemon(tmp_path / "b", **PATIENT) as b,
        Engine(tmp_path / "two.log", model, connector(a.directory), tensor_parallel_size=2) as two,
        Engine(tmp_path / "one.log", model, connector(b.directory)) as one,
    ):
        two.wait()
        one.wait()
        for length in (1, 300, 5000):
            tokens = prompt(length)
            alone = one.generate(tokens).tokens
            wait_until(one.blocks_are_free)  # and nothing is cached
            for prefill, decode in ((two, one), (one, two)):
                name = f"{length}-{prefill.log_path.stem}"
                told = prefill.generate(tokens, 1, sending(name)).result()
                wait_until(decode.blocks_are_free)
                assert decode.generate(tokens, params=told["params"]).tokens == alone
                wait_until(prefill.blocks_are_free)
        two.abort(aborted := two.generate(prompt(9000), params=fetching("nobody", b)))
        assert failed(aborted) or aborted.result()["reason"] == "abort"
        for engine, daemon in ((two, a), (one, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()
