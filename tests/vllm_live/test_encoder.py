"""An encoder on an engine of its own: what it hears comes to another engine through two daemons."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from live import LiveDaemon
from vllm_live.asking import FLAGS, failed, wait_until
from vllm_live.engines import Answer, Engine, encoder_connector, make_sounds_model

pytestmark = pytest.mark.timeout(900)
SOUND = 511  # the token that a sound's tokens replace
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "max_model_len": 4096,
    "limit_mm_per_prompt": {"audio": 3},
}
Sounds = list[tuple[int, float]]  # of a seed, so many seconds


@dataclass
class Scene:
    """What the tests of this file share."""

    a: LiveDaemon
    b: LiveDaemon
    encoder: Engine  # at daemon a
    decode: Engine  # at daemon b; encodes what it cannot fetch

    def encode(self, name: str, sounds: Sounds, attempt: int = 0) -> dict[str, Any]:
        """As a router does first; what the encoder told of its items."""
        told = self.encoder.generate(
            asked(sounds), 1, sounds=sounds, items={"transfer_id": name, "attempt": attempt}
        ).result()
        return dict(told["items"])

    def answer(self, sounds: Sounds, items: dict[str, Any] | None = None) -> Answer:
        """As a router does then. Without items decode encodes by itself."""
        return self.decode.generate(asked(sounds), sounds=sounds, items=items)

    def alone(self, sounds: Sounds) -> list[int]:
        """What decode answers alone, with nothing cached, before or after."""
        self.forget()
        tokens = self.answer(sounds).tokens
        self.forget()
        return tokens

    def forget(self) -> None:
        """Empty decode's caches, of tokens and of items."""
        wait_until(self.decode.blocks_are_free)
        self.decode.forget_items()

    def check_nothing_is_left(self) -> None:
        wait_until(self.decode.blocks_are_free)
        self.a.wait_until_free()
        self.b.wait_until_free()


def asked(sounds: Sounds) -> list[int]:
    """A prompt with so many sounds."""
    return [5, 6, *([SOUND, 7] * len(sounds)), 8]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("vllm")
    model = make_sounds_model(path / "model")
    with (
        LiveDaemon(path / "a", **FLAGS) as a,
        LiveDaemon(path / "b", **FLAGS) as b,
        Engine(
            path / "encoder.log",
            model,
            ec_transfer_config=encoder_connector(a.directory, "producer"),
            **OPTIONS,
        ) as encoder,
        Engine(
            path / "decode.log",
            model,
            ec_transfer_config=encoder_connector(b.directory, "consumer"),
            **OPTIONS,
        ) as decode,
    ):
        scene = Scene(a, b, encoder.wait(), decode.wait())
        yield scene
        scene.a.stop()


def test_tokens_are_those_of_an_engine_that_encodes_itself(scene: Scene) -> None:
    for sounds in ([(1, 0.3)], [(2, 1.0), (3, 2.5)], [(4, 29.0), (5, 0.1), (4, 29.0)]):
        alone = scene.alone(sounds)
        items = scene.encode(f"tokens-{len(sounds)}", sounds)
        assert len(items) == len(set(sounds))
        assert scene.answer(sounds, items).tokens == alone
        for item in items.values():
            (sink,) = scene.b.transfers(item["transfer_id"])
            assert sink.snapshot.sent_tokens == sink.snapshot.total_tokens != 0
        scene.check_nothing_is_left()


def test_bytes_that_are_changed_on_the_way_change_the_tokens(scene: Scene) -> None:
    """So the tokens of the other tests come out of what travelled."""
    sounds = [(6, 2.0)]
    alone = scene.alone(sounds)
    items = scene.encode("changed", sounds)
    (item,) = items.values()
    scene.a.wait_for_transfer(item["transfer_id"], lambda seen: seen.snapshot.available_tokens > 0)
    for pool in scene.a.status().pools:
        Path(pool.path).write_bytes(bytes(Path(pool.path).stat().st_size))
    assert scene.answer(sounds, items).tokens != alone
    scene.check_nothing_is_left()


def test_an_item_of_the_encoders_cache_goes_to_each_who_asks(scene: Scene) -> None:
    """Every one has a transfer of its own; the encoder runs once."""
    sounds = [(7, 1.5)]
    alone = scene.alone(sounds)
    found = [scene.encode(f"cached-{number}", sounds) for number in range(3)]
    assert len({item["transfer_id"] for items in found for item in items.values()}) == 3
    for items in found:
        scene.forget()
        assert scene.answer(sounds, items).tokens == alone
    scene.check_nothing_is_left()


def test_an_aborted_request_tells_the_encoder_that_nobody_will_come(scene: Scene) -> None:
    sounds = [(8, 1.0)]
    items = scene.encode("aborted", sounds)
    scene.forget()
    scene.a.pause()
    answer = scene.answer(sounds, items)
    (item,) = items.values()
    scene.b.wait_for_transfer(item["transfer_id"], lambda seen: True)
    scene.decode.abort(answer)
    assert answer.result()["reason"] == "abort"
    scene.a.resume()
    scene.check_nothing_is_left()


def test_what_nobody_asks_for_is_let_go_of(scene: Scene) -> None:
    (item,) = scene.encode("nobody", [(9, 1.0)]).values()
    scene.a.wait_for_transfer(item["transfer_id"], lambda seen: seen.ended)
    scene.check_nothing_is_left()


def test_a_retry_is_another_attempt(scene: Scene) -> None:
    sounds = [(10, 1.0)]
    alone = scene.alone(sounds)
    scene.encode("again", sounds)
    items = scene.encode("again", sounds, attempt=1)
    assert [item["attempt"] for item in items.values()] == [1]
    assert scene.answer(sounds, items).tokens == alone
    scene.check_nothing_is_left()


def test_what_cannot_be_fetched_is_encoded_where_it_is_needed(scene: Scene) -> None:
    sounds = [(11, 1.0)]
    alone = scene.alone(sounds)
    (told,) = scene.encode("lost", sounds).items()
    items = {told[0]: {**told[1], "transfer_id": "lost.never-sent"}}
    assert scene.answer(sounds, items).tokens == alone
    assert "encodes an item itself: stalled" in scene.decode.log()
    scene.check_nothing_is_left()


@pytest.mark.parametrize("way", ["lost", "unreadable"])
def test_a_request_that_lacks_an_item_and_its_media_fails_alone(scene: Scene, way: str) -> None:
    """Another one runs all the while, so that vLLM schedules steps before it hears of the failure."""
    sounds = [(13 if way == "lost" else 14, 1.0)]
    alone = scene.alone([(15, 1.0)])
    ((name, told),) = scene.encode(way, sounds).items()
    source = scene.a.wait_for_transfer(
        told["transfer_id"], lambda seen: seen.snapshot.total_tokens is not None
    )
    tokens = source.snapshot.total_tokens or 0
    if way == "lost":
        scene.encode(way, sounds, attempt=1)  # so that attempt 0 is over
    else:
        told["width"] = str(told["width"])
    long = scene.decode.generate([5, 6, 7], 1500)
    asked = [5, 6, *[SOUND] * tokens, 7, 8]
    lacking = scene.decode.generate(asked, names={name: [2, tokens]}, items={name: told})
    assert failed(lacking)
    assert len(long.tokens) == 1500
    assert scene.answer([(15, 1.0)]).tokens == alone
    scene.check_nothing_is_left()


def test_a_killed_encoders_daemon_fails_no_request(scene: Scene) -> None:
    sounds = [(12, 1.0)]
    alone = scene.alone(sounds)
    items = scene.encode("killed", sounds)
    scene.a.process.kill()
    assert scene.answer(sounds, items).tokens == alone
    scene.a = scene.a.again()
    assert scene.answer(sounds, scene.encode("after", sounds)).tokens == alone
    scene.check_nothing_is_left()
