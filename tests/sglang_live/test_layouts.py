"""Engines whose pages differ, another model, and what is refused when an engine starts."""

from pathlib import Path

import pytest

from live import LiveDaemon
from sglang_live.engines import FLAGS, Engine, make_model, wait_until
from vllm_live.asking import prompt

pytestmark = pytest.mark.timeout(900)
LENGTHS = (1, 15, 16, 17, 130, 300, 700, 3000, 9000)
PAGES = [("llama", 1, 16), ("llama", 16, 1), ("gemma3", 1, 1)]


@pytest.mark.parametrize(("kind", "prefill_page", "decode_page"), PAGES)
def test_engines_hand_over(tmp_path: Path, kind: str, prefill_page: int, decode_page: int) -> None:
    model = make_model(tmp_path / "model", kind)
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(tmp_path / "alone.log", model) as alone,
        Engine(
            tmp_path / "prefill.log", model, "prefill", a.directory, page_size=prefill_page
        ) as prefill,
        Engine(
            tmp_path / "decode.log", model, "decode", b.directory, page_size=decode_page
        ) as decode,
    ):
        prompts = [prompt(length) for length in LENGTHS]
        expected = [answer.tokens for answer in map(alone.wait().generate, prompts)]
        prefill.wait()
        decode.wait()
        answers = []
        for room, one in enumerate(prompts, 1):
            meeting = prefill.meeting(room)
            prefill.generate(one, meeting=meeting)
            answers.append(decode.generate(one, meeting=meeting))
        assert [answer.tokens for answer in answers] == expected
        for engine, daemon in ((prefill, a), (decode, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()


def test_what_cannot_be_done_is_refused_when_the_engine_starts(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with Engine(
        tmp_path / "log", model, "prefill", tmp_path, disaggregation_enable_kv_checksum=True
    ) as engine:
        assert "kvferry checks bytes itself" in engine.wait_for_end()
