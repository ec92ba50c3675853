"""Tensor-parallel engines: prefill and decode may have different numbers of ranks."""

from pathlib import Path

import pytest

from live import LiveDaemon
from sglang_live.engines import FLAGS, Engine, make_model, wait_until
from vllm_live.asking import prompt

pytestmark = pytest.mark.timeout(900)
TWO = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # SGLang asks for it where two ranks share a NUMA node
LENGTHS = (1, 129, 700, 3000)


def environment(ranks: int) -> dict[str, str]:
    return TWO if ranks == 2 else {}


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(2, 1), (1, 2)])
def test_ranks_hand_over(tmp_path: Path, prefill_ranks: int, decode_ranks: int) -> None:
    model = make_model(tmp_path / "model")
    with (
        LiveDaemon(tmp_path / "a", **FLAGS) as a,
        LiveDaemon(tmp_path / "b", **FLAGS) as b,
        Engine(tmp_path / "alone.log", model) as alone,
        Engine(
            tmp_path / "prefill.log",
            model,
            "prefill",
            a.directory,
            environment(prefill_ranks),
            tp_size=prefill_ranks,
        ) as prefill,
        Engine(
            tmp_path / "decode.log",
            model,
            "decode",
            b.directory,
            environment(decode_ranks),
            tp_size=decode_ranks,
        ) as decode,
    ):
        prompts = [prompt(length) for length in LENGTHS]
        expected = [answer.tokens for answer in map(alone.wait().generate, prompts)]
        prefill.wait()
        decode.wait()
        meetings = [prefill.meeting(room) for room in range(1, 1 + len(prompts))]
        answers = []
        for one, meeting in zip(prompts, meetings, strict=True):
            prefill.generate(one, meeting=meeting)
            answers.append(decode.generate(one, meeting=meeting))
        assert [answer.tokens for answer in answers] == expected
        for engine, daemon in ((prefill, a), (decode, b)):
            wait_until(engine.blocks_are_free)
            daemon.wait_until_free()
