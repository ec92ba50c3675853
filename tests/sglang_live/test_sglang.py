"""Two SGLang engines over two daemons, and a third one that does all of it alone.

The tests run in this order: engines take long to start, and the last ones kill them.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvferry_proto.states import TERMINAL
from kvferry_proto.worker import Snapshot
from live import LiveDaemon
from sglang_live.engines import FLAGS, Engine, make_model, wait_until
from vllm_live.asking import prompt
from vllm_live.engines import Answer

pytestmark = pytest.mark.timeout(900)
FREE_S = 40.0  # longer than the stall_s of what nobody comes for, from a daemon's restart on
LENGTHS = (
    *(1, 2, 3, 5, 17, 63, 64, 65, 100, 126, 127, 128, 129, 130, 200, 255, 256, 257, 300, 400),
    *(511, 513, 600, 900, 1023, 1500, 2047, 2049, 3000, 5000, 9000, 20_000),
)


def failed(answer: Answer) -> bool:
    """Whether a request ended with an error."""
    said = answer.result()
    return "error" in said or said["reason"] == "abort"


@dataclass
class Scene:
    """What the tests of this file share."""

    path: Path
    model: Path
    a: LiveDaemon
    b: LiveDaemon
    alone: Engine
    prefill: Engine  # at daemon a
    decode: Engine  # at daemon b
    rooms: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def meeting(self, room: int | None = None) -> dict[str, Any]:
        """What a router tells both engines."""
        return self.prefill.meeting(next(self.rooms) if room is None else room)

    def ask(self, tokens: list[int], room: int | None = None) -> tuple[Answer, Answer]:
        """As a router does: both engines at once. Prefill's answer, and decode's."""
        meeting = self.meeting(room)
        prefill = self.prefill.generate(tokens, meeting=meeting)
        return prefill, self.decode.generate(tokens, meeting=meeting)

    def wait_for_tokens(self, daemon: LiveDaemon, tokens: int) -> None:
        """Until a transfer that is under way has brought so many to a sink."""
        wait_until(lambda: any(one.sent_tokens >= tokens for one in self._moving(daemon)))

    def _moving(self, daemon: LiveDaemon) -> list[Snapshot]:
        found = [one.snapshot for one in daemon.transfers()]
        return [one for one in found if one.state not in TERMINAL]

    def check_nothing_is_left(self) -> None:
        """No request and no block is held, in any engine or daemon."""
        wait_until(self.prefill.blocks_are_free)
        wait_until(self.decode.blocks_are_free)
        for daemon in (self.a, self.b):
            daemon.wait_until_free(FREE_S)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("sglang")
    model = make_model(path / "model")
    with (
        LiveDaemon(path / "a", **FLAGS) as a,
        LiveDaemon(path / "b", **FLAGS) as b,
        Engine(path / "alone.log", model) as alone,
        Engine(path / "prefill.log", model, "prefill", a.directory) as prefill,
        Engine(path / "decode.log", model, "decode", b.directory) as decode,
    ):
        scene = Scene(path, model, a, b, alone.wait(), prefill.wait(), decode.wait())
        yield scene
        scene.a.stop()
        scene.b.stop()


def test_tokens_are_those_of_a_single_engine(scene: Scene) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    alone = [answer.tokens for answer in [scene.alone.generate(one) for one in prompts]]
    both = [scene.ask(one) for one in prompts]
    assert [decode.tokens for _, decode in both] == alone
    scene.check_nothing_is_left()


def test_values_beside_the_cache_arrive(scene: Scene) -> None:
    """The first token's logprob is prefill's, and comes as an aux value."""
    meeting = scene.meeting()
    scene.prefill.generate(prompt(300), meeting=meeting, logprobs=True)
    decode = scene.decode.generate(prompt(300), meeting=meeting, logprobs=True)
    alone = scene.alone.generate(prompt(300), logprobs=True)
    assert decode.result()["logprobs"] == pytest.approx(alone.result()["logprobs"], abs=1e-3)
    scene.check_nothing_is_left()


def test_prefill_is_free_before_anybody_has_fetched(scene: Scene) -> None:
    meeting = scene.meeting()
    prefill = scene.prefill.generate(prompt(3000), meeting=meeting)
    assert prefill.result()["reason"] == "length"
    wait_until(scene.prefill.blocks_are_free)
    decode = scene.decode.generate(prompt(3000), meeting=meeting)
    assert decode.tokens == scene.alone.generate(prompt(3000)).tokens
    scene.check_nothing_is_left()


def test_bytes_that_are_changed_on_the_way_change_the_tokens(scene: Scene) -> None:
    """So the tokens of the other tests come out of what travelled."""
    meeting = scene.meeting()
    assert scene.prefill.generate(prompt(700), meeting=meeting).result()["reason"] == "length"
    pool = Path(scene.a.status().pools[0].path)
    pool.write_bytes(bytes(pool.stat().st_size))
    decode = scene.decode.generate(prompt(700), meeting=meeting)
    alone = scene.alone.generate(prompt(700)).tokens
    assert decode.tokens[0] == alone[0]  # prefill's, which travels beside the cache
    assert decode.tokens != alone
    scene.check_nothing_is_left()


def test_a_room_that_comes_back_means_another_request(scene: Scene) -> None:
    for seed in range(2):
        _, decode = scene.ask(prompt(400, seed=seed), room=12345)
        assert decode.tokens == scene.alone.generate(prompt(400, seed=seed)).tokens
    scene.check_nothing_is_left()


def test_a_request_with_another_prompt_is_refused_and_the_engines_live_on(scene: Scene) -> None:
    meeting = scene.meeting()
    scene.prefill.generate(prompt(300, seed=1), meeting=meeting)
    decode = scene.decode.generate(prompt(300, seed=2), meeting=meeting)
    assert failed(decode)
    message = str(decode.result()["message"])
    assert "payload_mismatch" in message
    assert "prompt: " in message
    _, decode = scene.ask(prompt(300, seed=2))
    assert decode.tokens == scene.alone.generate(prompt(300, seed=2)).tokens
    scene.check_nothing_is_left()


def test_a_prompt_that_prefill_has_cached_is_sent(scene: Scene) -> None:
    begun = prompt(3000, seed=7)
    for tokens in (begun, [*begun, *prompt(500, seed=8)]):
        _, decode = scene.ask(tokens)
        assert decode.tokens == scene.alone.generate(tokens).tokens
    assert "cached prefixes are sent with what is computed" in scene.prefill.log()
    scene.check_nothing_is_left()


def test_an_aborted_decode_frees_all(scene: Scene) -> None:
    _, decode = scene.ask(prompt(20_000, seed=1))
    scene.wait_for_tokens(scene.b, 1)
    scene.decode.abort(decode)
    assert failed(decode)
    scene.check_nothing_is_left()


def test_an_aborted_prefill_fails_decode_and_frees_all(scene: Scene) -> None:
    prefill, decode = scene.ask(prompt(20_000, seed=2))
    scene.wait_for_tokens(scene.b, 1)
    scene.prefill.abort(prefill)
    assert failed(prefill)
    assert failed(decode)
    assert "source_failed: aborted: by its source" in str(decode.result()["message"])
    scene.check_nothing_is_left()


def test_what_nobody_fetches_fails_prefill_once_the_pool_is_full(scene: Scene) -> None:
    answer = scene.prefill.generate(prompt(20_000, seed=3), meeting=scene.meeting())
    assert failed(answer)
    scene.check_nothing_is_left()
    _, decode = scene.ask(prompt(200))
    assert decode.tokens == scene.alone.generate(prompt(200)).tokens


def test_what_nobody_sends_fails_decode(scene: Scene) -> None:
    answer = scene.decode.generate(prompt(300), meeting=scene.meeting())
    assert failed(answer)
    assert "was not opened for 40 s" in str(answer.result()["message"])
    scene.check_nothing_is_left()


def test_a_daemon_that_is_killed_and_comes_back_loses_nothing(scene: Scene) -> None:
    _, decode = scene.ask(prompt(20_000, seed=4))
    scene.wait_for_tokens(scene.b, 1)
    scene.prefill.pause()  # half-way; and a machine that is busy takes seconds to start a daemon
    scene.b.process.kill()
    scene.b = scene.b.again()
    scene.prefill.resume()
    assert decode.tokens == scene.alone.generate(prompt(20_000, seed=4)).tokens
    scene.check_nothing_is_left()


def test_a_killed_daemon_fails_the_request_and_the_engines_live_on(scene: Scene) -> None:
    meeting = scene.meeting()
    prefill = scene.prefill.generate(prompt(3000, seed=5), meeting=meeting)
    assert prefill.result()["reason"] == "length"
    scene.a.process.kill()
    decode = scene.decode.generate(prompt(3000, seed=5), meeting=meeting)
    assert failed(decode)
    message = str(decode.result()["message"])
    assert "peer_unreachable" in message or "stalled" in message
    scene.a = scene.a.again()
    _, decode = scene.ask(prompt(800, seed=5))
    assert decode.tokens == scene.alone.generate(prompt(800, seed=5)).tokens
    scene.check_nothing_is_left()


def test_a_daemon_may_come_late_and_models_that_differ_are_told_apart(scene: Scene) -> None:
    other = make_model(scene.path / "other", seed=8)
    directory = scene.path / "c"
    late = {"KVFERRY_CONNECT_S": "1"}
    with Engine(scene.path / "other.log", other, "decode", directory, late) as engine:
        engine.wait()
        assert "waiting for kvferry's daemon" in engine.log()
        meeting = scene.meeting()
        scene.prefill.generate(prompt(300), meeting=meeting)
        answer = engine.generate(prompt(300), meeting=meeting)
        assert failed(answer)
        assert "daemon_unreachable" in str(answer.result()["message"])
        with LiveDaemon(directory, **FLAGS) as c:
            c.wait_for_workers(1)
            meeting = scene.meeting()
            scene.prefill.generate(prompt(300), meeting=meeting)
            answer = engine.generate(prompt(300), meeting=meeting)
            assert failed(answer)
            message = str(answer.result()["message"])
            assert "payload_mismatch" in message
            assert "model.weights: " in message
            wait_until(engine.blocks_are_free)
    scene.check_nothing_is_left()


def test_a_killed_prefill_engine_fails_decode_and_frees_the_daemons(scene: Scene) -> None:
    _, decode = scene.ask(prompt(20_000, seed=6))
    scene.wait_for_tokens(scene.b, 1)
    scene.prefill.kill()
    assert failed(decode)
    assert "worker_lost" in str(decode.result()["message"])
    wait_until(scene.decode.blocks_are_free)
    scene.a.wait_until_free()
    scene.b.wait_until_free()
