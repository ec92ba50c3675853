"""A model of two kinds of layers, of which one looks back a window only: two block tables a request."""

from pathlib import Path

import pytest

from kvferry_proto.states import State
from live import LiveDaemon
from vllm_live.asking import FLAGS, failed, fetching, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model

pytestmark = pytest.mark.timeout(900)
LENGTHS = (1, 130, 300, 700, 3000, 9000)


def test_layers_with_and_without_a_window_hand_over(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind="gemma3")
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(tmp_path / "prefill.log", model, connector(a.directory)) as prefill,
        Engine(tmp_path / "decode.log", model, connector(b.directory)) as decode,
    ):
        prefill.wait()
        decode.wait()
        prompts = [prompt(length) for length in LENGTHS]
        alone = [answer.tokens for answer in [decode.generate(one) for one in prompts]]
        wait_until(decode.blocks_are_free)  # and nothing is cached
        sent = [prefill.generate(one, 1, sending(f"t{len(one)}")) for one in prompts]
        got = [
            decode.generate(one, params=prefilled.result()["params"])
            for one, prefilled in zip(prompts, sent, strict=True)
        ]
        assert [answer.tokens for answer in got] == alone
        assert failed(decode.generate(prompt(500, seed=1), params=fetching("nobody", a)))
        generated = prefill.generate(prompt(500, seed=2), 4, sending("on-and-on")).result()
        assert generated["params"] is None
        (given_up,) = a.transfers("on-and-on")  # so that a decode which waits for it hears of it
        assert given_up.snapshot.state is State.FAILED
        assert given_up.snapshot.available_tokens == 0
        assert "with a sliding window max_tokens has to be 1, not 4" in prefill.log()
        groups = {name.rpartition("layers.")[2][:1] for name in a.status().pools[0].planes}
        assert groups == set("0123")
        for engine, daemon in ((prefill, a), (decode, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()
