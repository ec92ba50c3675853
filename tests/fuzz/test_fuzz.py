"""The short form of the fuzzing, and what it has found so far."""

from contextlib import closing
from random import Random
from typing import Any

import msgpack
import pytest

from fuzz.files import Files
from fuzz.run import SHARES
from fuzz.seeds import told
from fuzz.targets import CODECS, TARGETS, Decoding, decoded, restored
from kvferry_daemon.core.past import LedgerWrong
from kvferry_proto import peer

FRAMES = 3_000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_frame_breaks_what_must_hold(name: str) -> None:
    with closing(TARGETS[name](Random(20261126))) as target:
        for _ in range(FRAMES):
            target()


def test_some_frames_are_still_messages() -> None:
    """Were all refused, nothing behind the decoder would be tried."""
    decoding = Decoding(Random(1))
    taken = sum(
        any(decoded(codec, frame) is not None for codec in CODECS)
        for frame in (decoding() for _ in range(1_000))
    )
    assert 100 < taken < 800


def test_the_long_form_plays_all_of_them() -> None:
    assert set(SHARES) == set(TARGETS)


def test_a_good_file_of_a_ledger_is_gone_on_from() -> None:
    """Were all set aside, no changed one would be read."""
    with closing(Files(Random(1))) as files:
        past = files.good_ledger().past
    assert past is not None
    assert past.transfers


def test_changed_files_are_still_read_now_and_then() -> None:
    with closing(Files(Random(1))) as files:
        lives = [files.changed_ledger().past for _ in range(200)]
    assert 20 < sum(past is not None for past in lives) < 180


def rows_with(kind: str, change: Any) -> dict[str, bytes]:
    """A good ledger but for one row of a kind."""
    rows = dict(told().rows)
    for name, body in rows.items():
        fields = msgpack.unpackb(body)
        if fields["kind"] == kind:
            change(fields)
            rows[name] = msgpack.packb(fields)
    return rows


def test_a_good_ledger_is_gone_on_from() -> None:
    assert restored(rows_with("opening", lambda fields: None)).transfers


def test_a_rank_that_its_group_does_not_have_is_no_good_ledger() -> None:
    """It ended the daemon's start with an IndexError."""
    with pytest.raises(LedgerWrong, match="rank 3 of 1"):
        restored(rows_with("opening", lambda fields: fields["call"].update(rank=3)))


def test_a_lease_of_no_block_is_no_good_ledger() -> None:
    """It ended the daemon's start with a PoolError."""

    def with_an_empty_lease(fields: dict[str, Any]) -> None:
        fields["leases"] = [[(1 << 40) + 9, 1, 0]]

    with pytest.raises(LedgerWrong, match="lost or doubled"):
        restored(rows_with("transfer", with_an_empty_lease))


def test_a_resume_beyond_any_token_is_no_good_ledger() -> None:
    """The transfer's history has no room for such a number, and the daemon's start ended there."""
    with pytest.raises(LedgerWrong, match="last_resume_at"):
        restored(rows_with("transfer", lambda fields: fields.update(last_resume_at=(1 << 64) - 1)))


def test_a_welcome_of_a_version_that_cannot_be_is_refused() -> None:
    """It raised on the event loop of whoever was welcomed."""
    welcome = peer.PeerWelcome(version=1, boot_id="a" * 32, sink_boot_id="b" * 32)
    fields = msgpack.unpackb(peer.MESSAGES.encode(welcome))
    assert decoded(peer.MESSAGES, msgpack.packb(fields | {"version": 0})) is None
