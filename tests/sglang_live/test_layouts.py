"""Engines whose pages differ, another model, and what is refused when an engine starts."""

from pathlib import Path

import pytest

from live import LiveDaemon
from sglang_live.engines import FLAGS, Engine, make_model, wait_until
from vllm_live.asking import prompt

pytestmark = pytest.mark.timeout(900)
TRY = {"KVFERRY_ALLOW_UNTRIED": "1"}
LENGTHS = (1, 15, 16, 17, 130, 300, 700, 3000, 9000)
PAGES = [("llama", 1, 16), ("llama", 16, 1), ("gemma3", 1, 1)]  # no CPU starts SGLang's deepseek


@pytest.mark.parametrize(("kind", "prefill_page", "decode_page"), PAGES)
def test_engines_hand_over(tmp_path: Path, kind: str, prefill_page: int, decode_page: int) -> None:
    model = make_model(tmp_path / "model", kind)
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(tmp_path / "alone.log", model) as alone,
        Engine(
            tmp_path / "prefill.log", model, "prefill", a.directory, TRY, page_size=prefill_page
        ) as prefill,
        Engine(
            tmp_path / "decode.log", model, "decode", b.directory, TRY, page_size=decode_page
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


def test_a_cached_prefix_is_sent_before_the_rest_is_computed(tmp_path: Path) -> None:
    """SGLang's default, which on a CPU works without overlapping steps only."""
    model = make_model(tmp_path / "model")
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(
            tmp_path / "prefill.log",
            model,
            "prefill",
            a.directory,
            TRY,
            disable_overlap_schedule=True,
        ) as prefill,
        Engine(tmp_path / "decode.log", model, "decode", b.directory) as decode,
        Engine(tmp_path / "alone.log", model) as alone,
    ):
        alone.wait()
        prefill.wait()
        decode.wait()
        begun = prompt(3000)
        for room, more in enumerate((0, 500, 5000), 1):
            tokens = [*begun, *prompt(more, seed=9)]
            meeting = prefill.meeting(room)
            prefill.generate(tokens, meeting=meeting)
            answer = decode.generate(tokens, meeting=meeting)
            assert answer.tokens == alone.generate(tokens).tokens
        assert "cached prefixes are sent with what is computed" not in prefill.log()
        for engine, daemon in ((prefill, a), (decode, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()


def test_planes_that_differ_are_told_by_name(tmp_path: Path) -> None:
    """Where both models are said to be one: else that they are not is told first."""
    alike = {"KVFERRY_MODEL_FINGERPRINT": "alike"}
    narrow = make_model(tmp_path / "narrow")
    wide = make_model(tmp_path / "wide", head_dim=64)
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(tmp_path / "prefill.log", narrow, "prefill", a.directory, alike) as prefill,
        Engine(tmp_path / "decode.log", wide, "decode", b.directory, alike) as decode,
    ):
        prefill.wait()
        decode.wait()
        for room in range(2):
            meeting = prefill.meeting(room)
            prefill.generate(prompt(300), meeting=meeting)
            message = str(decode.generate(prompt(300), meeting=meeting).result()["message"])
            assert "(0.k) shape: (2, 32) at the source, (2, 64) at the sink" in message
        for engine, daemon in ((prefill, a), (decode, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()


def test_what_cannot_be_done_is_refused_when_the_engine_starts(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    asked = Engine(
        tmp_path / "log", model, "prefill", tmp_path, disaggregation_enable_kv_checksum=True
    )
    with asked as engine:
        assert "kvferry checks bytes itself" in engine.wait_for_end()
