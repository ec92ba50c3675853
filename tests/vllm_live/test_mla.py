"""A model with multi-head latent attention: one latent a token and layer, the same in every rank.

vLLM's CPU kernels make other logits of a prompt's last token than of the same token when it is
decoded, with no connector at all. A fetched prompt's last token is always decoded; so what is asked
for here ends in a token that the engine which works alone decodes as well.
"""

from pathlib import Path
from typing import Any

import pytest

from live import LiveDaemon
from vllm_live.asking import FLAGS, prompt, sending, wait_until
from vllm_live.engines import Engine, connector, make_model

pytestmark = pytest.mark.timeout(900)
OPTIONS: dict[str, Any] = {"max_model_len": 4096}
LENGTHS = (1, 15, 130, 700, 3000)


def test_latents_hand_over(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind="deepseek")
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(tmp_path / "prefill.log", model, connector(a.directory), **OPTIONS) as prefill,
        Engine(tmp_path / "decode.log", model, connector(b.directory), **OPTIONS) as decode,
    ):
        prefill.wait()
        decode.wait()
        for length in LENGTHS:
            begun = prompt(length)
            alone = decode.generate(begun, 17).tokens
            tokens = [*begun, alone[0]]
            told = prefill.generate(tokens, 1, sending(f"t{length}")).result()
            assert decode.generate(tokens, params=told["params"]).tokens == alone[1:]
            (sink,) = b.transfers(f"t{length}")
            assert sink.snapshot.sent_tokens > length
        told = prefill.generate(prompt(400), 1, sending("changed")).result()
        a.wait_for_transfer("changed", lambda seen: seen.snapshot.available_tokens >= 400)
        pool = Path(a.status().pools[0].path)
        pool.write_bytes(bytes(pool.stat().st_size))
        changed = decode.generate(prompt(400), params=told["params"]).tokens
        told = prefill.generate(prompt(400), 1, sending("as-it-was")).result()
        as_it_was = decode.generate(prompt(400), params=told["params"]).tokens
        assert changed != as_it_was, "tokens do not depend on what travels"
        for engine, daemon in ((prefill, a), (decode, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()
