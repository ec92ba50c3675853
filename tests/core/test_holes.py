"""The holes of the plain rule: each test passes on ours, and shows that the plain one falls in.

Ranks of one group that disagree are the one hole without a test here: groups do not exist yet.
"""

from core.plain import PlainSink, Slot
from core.stories import Story
from kvferry_proto.states import StallReason, State
from world import BLOCK, World

WINDOW = 8


class PlainWorld:
    """A source that pushes, and a network that can lose or double what is asked."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.attempt = 0
        self.asked: list[int] = []
        self.sink = PlainSink(WINDOW // BLOCK, BLOCK, self.asked.append)
        self.sink.ask()

    def serve(self, first: int, tokens: int = WINDOW) -> None:
        slots: list[Slot] = [
            (self.attempt, t) for t in range(first, min(first + tokens, self.total))
        ]
        self.sink.receive(first, slots)


def at_a_full_window(total: int = 4 * WINDOW) -> Story:
    """Ours: one window has landed and waits to be taken over."""
    story = Story(total, World(blocks=2 * WINDOW // BLOCK, window_tokens=WINDOW))
    story.open()
    story.world.wait(0.02)
    story.produce()
    story.world.wait(0.02)
    seen = story.sink()
    assert (seen.sent_tokens, seen.stall) == (WINDOW, StallReason.WAITING_FOR_RESUME)
    story.take(seen)
    return story


def test_stale_contents_of_a_reused_block_are_not_counted() -> None:
    story = at_a_full_window()
    story.resume(WINDOW)  # the same blocks again, full of the first window's tokens
    assert story.sink().sent_tokens == WINDOW

    plain = PlainWorld(4 * WINDOW)
    plain.serve(0)
    plain.sink.resume()
    assert plain.sink.poll() == 2 * WINDOW, "the plain rule counted what the blocks held before"


def test_a_lost_resume_is_asked_again() -> None:
    story = at_a_full_window()
    story.resume(WINDOW)
    story.produce()
    story.world.wire.clear()  # everything that it caused is lost
    story.world.wait(3)
    assert story.sink().sent_tokens == 2 * WINDOW

    plain = PlainWorld(4 * WINDOW)
    plain.serve(0)
    plain.sink.resume()
    plain.asked.clear()  # lost
    plain.sink.slots = [None] * WINDOW
    plain.sink.resume()
    assert plain.asked == [], "the plain rule took the repeat for a duplicate and never asks again"


def test_a_doubled_resume_moves_nothing_twice() -> None:
    story = at_a_full_window()
    once = story.resume(WINDOW)
    assert story.resume(WINDOW).transfers == once.transfers
    assert story.resume(0).transfers == once.transfers  # stale: it overtook
    story.check(story.run())

    plain = PlainWorld(4 * WINDOW)
    plain.serve(0)
    plain.sink.resume()
    plain.serve(WINDOW)
    plain.serve(WINDOW + BLOCK)  # the doubled request was served too, from where it was by then
    got = [slot for slot in plain.sink.slots if slot is not None]
    plain.sink.resume()
    assert plain.sink.sent != WINDOW + len(set(got)) or plain.sink.poll() != plain.sink.sent, (
        "two chunks in one window"
    )


def test_a_window_of_zero_tokens() -> None:
    story = Story(WINDOW)
    story.open()
    story.world.wait(0.02)
    story.produce()
    story.world.wait(0.02)
    story.take(story.sink())
    story.resume(WINDOW)
    story.world.wait(0.02)
    assert story.sink().stall is not None  # it waits for tokens, and the next window brings none
    story.ready(WINDOW, WINDOW)
    story.world.wait(0.02)
    assert story.sink().state is State.SUCCESS

    plain = PlainWorld(WINDOW)
    plain.serve(0)
    plain.sink.resume()
    plain.sink.slots = [None] * WINDOW
    plain.serve(WINDOW)  # brings nothing, and so no total either
    plain.sink.resume()
    assert plain.sink.total is None
    assert plain.sink.requests == 2, "the plain rule hears of no end and asks no more"


def test_no_resume_storm_at_zero_tokens_with_a_known_total() -> None:
    story = Story(WINDOW, late=False)
    story.open()
    story.world.wait(0.02)
    for _ in range(50):
        before = story.sink()
        assert story.resume(0).transfers[0].sent_tokens == 0
    after = story.sink()
    assert (after.base_tokens, after.allocated_tokens) == (0, before.allocated_tokens)
    assert len(story.world.wire) <= 1

    plain = PlainWorld(WINDOW)
    plain.sink.total = WINDOW
    for _ in range(50):
        plain.sink.resume()
    assert len(plain.asked) == 51, "nothing holds the plain rule back at zero"


def test_a_retry_inherits_no_progress() -> None:
    story = at_a_full_window()
    story.attempt = 1
    story.open()
    seen = story.sink()
    assert (seen.sent_tokens, seen.partial_sent_tokens, seen.last_resume_at) == (0, 0, -1)

    plain = PlainWorld(4 * WINDOW)
    plain.serve(0)
    plain.sink.resume()
    plain.asked.clear()
    plain.attempt = 1
    plain.sink.retry()
    assert plain.asked == [WINDOW], "the plain rule goes on where the dead attempt was"


def test_the_total_is_not_read_from_a_block() -> None:
    story = at_a_full_window()
    story.resume(WINDOW)
    assert story.sink().total_tokens is None  # nobody has told it, whatever the blocks hold

    plain = PlainWorld(4 * WINDOW)
    plain.serve(WINDOW)
    plain.sink.receive(0, [(0, 3)])
    assert plain.sink.read_total() == 3, "a token was taken for the total"


def test_second_window_landed_is_not_first_window_landed() -> None:
    story = at_a_full_window()
    first = story.sink()
    story.resume(WINDOW)
    for _ in range(20):
        story.world.wait(0.02)
        story.produce()
    second = story.sink()
    assert first.runs == second.runs  # the blocks cannot tell them apart
    assert (first.sent_tokens, second.sent_tokens) == (WINDOW, 2 * WINDOW)
    assert first.snapshot < second.snapshot

    plain = PlainWorld(4 * WINDOW)
    plain.serve(0)
    landed = _indices(plain.sink)
    plain.sink.sent = WINDOW
    plain.sink.slots = [None] * WINDOW
    plain.serve(WINDOW)
    assert _indices(plain.sink) == landed, "by its blocks, the second window is the first"


def _indices(sink: PlainSink) -> list[int]:
    return [index for index, slot in enumerate(sink.slots) if slot is not None]
