"""Two real vLLM engines, prefill and decode, and a third one that does all of it alone.

The tests run in this order: engines take long to start, and the last ones kill them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvferry_daemon.operator import ask
from kvferry_proto import control
from live import LiveDaemon
from vllm_live.asking import FLAGS, failed, fetching, prompt, sending, wait_until
from vllm_live.engines import Answer, Engine, connector, make_model
from vllm_live.pair import Pair

pytestmark = pytest.mark.timeout(900)
LENGTHS = (
    *(1, 2, 3, 5, 17, 63, 64, 65, 100, 126, 127, 128, 129, 130, 200, 255, 256, 257, 300, 400),
    *(511, 513, 600, 900, 1023, 1500, 2047, 2049, 3000, 5000, 9000, 20_000),
)
# On a slow machine 32 prompts wait so long for their first step, and a daemon takes so long to start.
PATIENT = {**FLAGS, "stall_s": 16, "lost_s": 12}


@dataclass
class Scene(Pair):
    """Prefill recomputes what cannot be loaded; decode fails such a request."""

    path: Path
    model: Path
    alone: Engine

    def ask(self, name: str, tokens: list[int]) -> Answer:
        """As a router does: prefill first, then decode with what prefill told."""
        told = self.prefill.generate(tokens, 1, sending(name)).result()
        return self.decode.generate(tokens, params=told["params"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("vllm")
    model = make_model(path / "model")
    with (
        LiveDaemon(path / "a", **PATIENT) as a,
        LiveDaemon(path / "b", **PATIENT) as b,
        Engine(path / "alone.log", model) as alone,
        Engine(path / "prefill.log", model, connector(a.directory, policy="recompute")) as prefill,
        Engine(path / "decode.log", model, connector(b.directory)) as decode,
    ):
        scene = Scene(a, b, prefill.wait(), decode.wait(), path, model, alone.wait())
        yield scene
        scene.a.stop()
        scene.b.stop()


def params(scene: Scene, tokens: list[int], prefill: Answer) -> dict[str, Any]:
    """What decode is told: by prefill, or at once, as what is above a window waits for its sink."""
    if len(tokens) > FLAGS["window_tokens"]:
        return fetching(f"all-{len(tokens)}", scene.a)
    return dict(prefill.result()["params"])


def test_tokens_are_those_of_a_single_engine(scene: Scene) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    alone = [answer.tokens for answer in [scene.alone.generate(one) for one in prompts]]
    prefills = [scene.prefill.generate(one, 1, sending(f"all-{len(one)}")) for one in prompts]
    decodes = [
        scene.decode.generate(one, params=params(scene, one, prefill))
        for one, prefill in zip(prompts, prefills, strict=True)
    ]
    assert [one.tokens for one in decodes] == alone
    scene.check_nothing_is_left()


def test_only_what_decode_has_not_is_fetched(scene: Scene) -> None:
    first, second = prompt(600), prompt(600) + prompt(300, seed=1)
    assert scene.ask("prefix", first).tokens == scene.alone.generate(first).tokens
    assert scene.ask("longer", second).tokens == scene.alone.generate(second).tokens
    (sink,) = scene.b.transfers("longer")
    assert sink.snapshot.start_tokens == 512  # 600 in whole blocks
    scene.check_nothing_is_left()


def test_bytes_that_are_changed_on_the_way_change_the_tokens(scene: Scene) -> None:
    """So the tokens of the other tests come out of what travelled."""
    told = scene.prefill.generate(prompt(700), 1, sending("changed")).result()
    scene.a.wait_for_transfer("changed", lambda seen: seen.snapshot.available_tokens == 768)
    pool = Path(scene.a.status().pools[0].path)
    pool.write_bytes(bytes(pool.stat().st_size))
    decode = scene.decode.generate(prompt(700), params=told["params"])
    assert decode.tokens != scene.alone.generate(prompt(700)).tokens
    scene.check_nothing_is_left()


def test_prefill_is_free_before_anybody_has_fetched(scene: Scene) -> None:
    told = scene.prefill.generate(prompt(3000), 1, sending("early")).result()
    wait_until(scene.prefill.blocks_are_free)
    decode = scene.decode.generate(prompt(3000), params=told["params"])
    assert decode.tokens == scene.alone.generate(prompt(3000)).tokens
    scene.check_nothing_is_left()


def test_an_aborted_decode_frees_all(scene: Scene) -> None:
    told = scene.prefill.generate(prompt(3000), 1, sending("abort-decode")).result()
    scene.a.pause()
    decode = scene.decode.generate(prompt(3000), params=told["params"])
    scene.b.wait_for_transfer("abort-decode", lambda seen: True)
    scene.decode.abort(decode)
    assert decode.result()["reason"] == "abort"
    scene.a.resume()
    scene.check_nothing_is_left()


def test_an_aborted_prefill_fails_decode_and_frees_all(scene: Scene) -> None:
    long = prompt(20_000, seed=2)
    prefill = scene.prefill.generate(long, 1, sending("abort-prefill"))
    scene.a.wait_for_transfer("abort-prefill", lambda seen: seen.snapshot.available_tokens > 0)
    decode = scene.decode.generate(long, params=fetching("abort-prefill", scene.a))
    scene.b.wait_for_transfer("abort-prefill", lambda seen: seen.snapshot.sent_tokens > 0)
    scene.prefill.abort(prefill)
    assert prefill.result()["reason"] == "abort"
    assert failed(decode)
    assert "source_failed: aborted: by its source" in scene.decode.log()
    scene.check_nothing_is_left()


def test_what_did_arrive_is_kept_and_the_rest_is_computed(scene: Scene) -> None:
    """The other way round: prefill's engine recomputes what it cannot load."""
    long = prompt(20_000, seed=7)
    aborted = scene.decode.generate(long, 1, sending("half"))
    answer = scene.prefill.generate(long, params=fetching("half", scene.b))
    scene.a.wait_for_transfer("half", lambda seen: seen.snapshot.partial_sent_tokens > 0)
    scene.decode.abort(aborted)
    assert aborted.result()["reason"] == "abort"
    assert answer.tokens == scene.alone.generate(long).tokens
    (lost,) = re.findall(r"rescheduled \((\d+) tokens affected\)", scene.prefill.log())
    assert 0 < int(lost) < len(long)
    scene.check_nothing_is_left()


def test_decode_may_be_asked_before_prefill(scene: Scene) -> None:
    """A router that knows the source's address need not wait for prefill."""
    decode = scene.decode.generate(prompt(5000), params=fetching("at-once", scene.a))
    scene.b.wait_for_transfer("at-once", lambda seen: True)
    scene.prefill.generate(prompt(5000), 1, sending("at-once"))
    assert decode.tokens == scene.alone.generate(prompt(5000)).tokens
    scene.check_nothing_is_left()


def test_a_prefill_that_is_aborted_at_once_fails_decode_at_once(scene: Scene) -> None:
    """Long before the 8 s after which a decode gives up by itself; mostly before its first step."""
    long = prompt(20_000, seed=8)
    decode = scene.decode.generate(long, params=fetching("at-once-gone", scene.a))
    scene.b.wait_for_transfer("at-once-gone", lambda seen: True)
    prefill = scene.prefill.generate(long, 1, sending("at-once-gone"))
    scene.prefill.abort(prefill)
    assert prefill.result()["reason"] == "abort"
    assert failed(decode)
    words = "transfer at-once-gone, attempt 0, was not received: source_failed: aborted"
    assert words in scene.decode.log()
    scene.check_nothing_is_left()


def test_what_a_draining_daemon_does_not_take_decode_computes(scene: Scene) -> None:
    """Of a prompt of several steps: after one alone vLLM answers before it hears of it."""
    tokens = prompt(5000, seed=9)
    ask(scene.a.directory, control.SetDraining(draining=True))
    told = scene.prefill.generate(tokens, 1, sending("draining")).result()
    ask(scene.a.directory, control.SetDraining(draining=False))
    assert told["params"] is None
    assert "was not sent" in scene.prefill.log()
    assert scene.decode.generate(tokens).tokens == scene.alone.generate(tokens).tokens
    tokens = prompt(700, seed=9)
    assert scene.ask("undrained", tokens).tokens == scene.alone.generate(tokens).tokens
    scene.check_nothing_is_left()


def test_a_preempted_prefill_goes_on_where_it_was(scene: Scene) -> None:
    long = prompt(20_000, seed=6)
    prefill = scene.prefill.generate(long, 1, sending("preempted"))
    decode = scene.decode.generate(long, params=fetching("preempted", scene.a))
    scene.a.wait_for_transfer("preempted", lambda seen: seen.snapshot.available_tokens > 0)
    assert scene.prefill.preempt(), "nothing of it had to be computed anew"
    assert prefill.result()["reason"] == "length"
    assert decode.tokens == scene.alone.generate(long).tokens
    scene.check_nothing_is_left()


def test_a_retry_is_another_attempt(scene: Scene) -> None:
    told = scene.prefill.generate(prompt(900), 1, sending("again")).result()
    pool = Path(scene.a.status().pools[0].path)
    scene.a.wait_for_transfer("again", lambda seen: seen.snapshot.available_tokens == 1024)
    pool.write_bytes(bytes(pool.stat().st_size))  # what the first attempt sent is of no use
    told = scene.prefill.generate(prompt(900), 1, sending("again", attempt=1)).result()
    assert told["params"]["attempt"] == 1
    decode = scene.decode.generate(prompt(900), params=told["params"])
    assert decode.tokens == scene.alone.generate(prompt(900)).tokens
    scene.check_nothing_is_left()


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_what_nobody_sends_ends_as_the_policy_says(scene: Scene, policy: str) -> None:
    """Of this scene's engines prefill recomputes, and decode fails."""
    engine = scene.decode if policy == "fail" else scene.prefill
    source = scene.a if policy == "fail" else scene.b
    answer = engine.generate(prompt(300), params=fetching(f"nobody-{policy}", source))
    if policy == "fail":
        assert failed(answer)
    else:
        assert answer.tokens == scene.alone.generate(prompt(300)).tokens
    assert "stalled" in engine.log()
    scene.check_nothing_is_left()


def test_a_daemon_that_is_killed_and_comes_back_loses_nothing(scene: Scene) -> None:
    long = prompt(20_000, seed=3)
    scene.prefill.generate(long, 1, sending("restart"))
    decode = scene.decode.generate(long, params=fetching("restart", scene.a))
    scene.b.wait_for_transfer("restart", lambda seen: seen.snapshot.sent_tokens > 0)
    scene.prefill.pause()  # half-way; and a machine that is busy takes seconds to start a daemon
    scene.b.process.kill()
    scene.b = scene.b.again()
    scene.prefill.resume()
    assert decode.tokens == scene.alone.generate(long).tokens
    scene.check_nothing_is_left()


def test_a_killed_daemon_fails_decode_and_the_engines_live_on(scene: Scene) -> None:
    told = scene.prefill.generate(prompt(3000, seed=4), 1, sending("killed")).result()
    scene.a.process.kill()
    answer = scene.decode.generate(prompt(3000, seed=4), params=told["params"])
    assert failed(answer)
    assert "peer_unreachable" in scene.decode.log() or "stalled" in scene.decode.log()
    scene.a = scene.a.again()
    tokens = prompt(800, seed=4)
    assert scene.ask("after", tokens).tokens == scene.alone.generate(tokens).tokens
    scene.check_nothing_is_left()


def test_a_daemon_may_come_late_and_models_that_differ_are_told_apart(scene: Scene) -> None:
    other = make_model(scene.path / "other", head_dim=64)
    directory = scene.path / "c"
    transfer = connector(directory, connect_s=1)
    with Engine(scene.path / "other.log", other, transfer) as engine:
        engine.wait()
        assert "waiting for kvferry's daemon" in engine.log()
        with LiveDaemon(directory, **PATIENT) as c:
            c.wait_for_workers(1)
            told = scene.prefill.generate(prompt(300), 1, sending("differ")).result()
            assert failed(engine.generate(prompt(300), params=told["params"]))
            words = "self_attn.attn.CPU_ATTN.128.vec) shape: (2, 64) at the source, (2, 128) at the sink"
            assert words in engine.log()
            assert engine.generate(prompt(20)).tokens
            wait_until(engine.blocks_are_free)
    scene.check_nothing_is_left()


def test_a_killed_prefill_engine_fails_decode_and_frees_the_daemons(scene: Scene) -> None:
    long = prompt(20_000, seed=5)
    scene.prefill.generate(long, 1, sending("engine"))
    decode = scene.decode.generate(long, params=fetching("engine", scene.a))
    scene.b.wait_for_transfer("engine", lambda seen: seen.snapshot.sent_tokens > 0)
    scene.prefill.kill()
    assert failed(decode)
    assert "worker_lost" in scene.decode.log()
    wait_until(scene.decode.blocks_are_free)
    scene.a.wait_until_free()
    scene.b.wait_until_free()
