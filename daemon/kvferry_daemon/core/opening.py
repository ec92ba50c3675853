"""Turns a send or receive into the opening of a transfer, or refuses its numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from kvferry_daemon.core.aux_values import digest_of
from kvferry_daemon.core.blocks import PoolBook
from kvferry_daemon.core.events import Key, Timing
from kvferry_daemon.core.records import OpeningRecord
from kvferry_daemon.core.session import Session
from kvferry_daemon.core.settings import Settings
from kvferry_daemon.core.shape import Side, check_side
from kvferry_daemon.core.transfer import Opening
from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Mode

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_SCOPE = r"(%[A-Za-z0-9]+)?"
ADDRESS = re.compile(
    rf"tcp://(\[[0-9A-Fa-f:.]+{_SCOPE}\]|{_LABEL}(\.{_LABEL})*\.?):(?P<port>[0-9]{{1,5}})"
    r"(?P<key>\?key=[0-9a-f]{64})?"
)


class Opened(NamedTuple):
    """What a transfer was opened with, as long as anybody may say it again.

    Of its aux values there is a digest: they may be as large as 200 other transfers.
    """

    call: worker.Send | worker.Receive
    aux_digest: bytes | None
    pool_id: str

    @classmethod
    def by(cls, call: worker.Send | worker.Receive, pool_id: str) -> Opened:
        """What is kept of this call."""
        if isinstance(call, worker.Receive) or call.aux is None:
            return cls(call, None, pool_id)
        return cls(call.model_copy(update={"aux": None}), digest_of(call.aux), pool_id)

    @classmethod
    def noted(cls, record: OpeningRecord) -> Opened:
        """What the ledger holds; what earlier versions wrote has the values themselves."""
        opened = cls.by(record.call, record.pool_id)
        return (
            opened if record.aux_digest is None else opened._replace(aux_digest=record.aux_digest)
        )


def opening_of(
    key: Key,
    session: Session,
    book: PoolBook,
    settings: Settings,
    call: worker.Send | worker.Receive,
) -> Opening:
    """Check every number of the call against the pool; raise FerryError or return the opening."""
    size, ranks = book.layout.block_size_tokens, call.world_size
    if call.rank >= ranks:
        raise FerryError(Code.BAD_RANK, f"rank {call.rank} of a group of {ranks}")
    check_side(Side.of(book.layout, ranks), "group" if ranks > 1 else "worker")
    if call.start_tokens % size:
        raise FerryError(
            Code.START_UNALIGNED,
            f"start_tokens {call.start_tokens} is no multiple of the block's {size} tokens",
        )
    window_blocks = max(1, -(-(call.window_tokens or settings.window_tokens) // size))
    source, max_tokens = None, None
    needed_blocks, what = window_blocks, f"a window of {window_blocks * size} tokens"
    if isinstance(call, worker.Receive):
        source = checked_address(call.source)
        check_key(source, settings.peer_address)
        max_tokens = _checked_max(call)
        if source == settings.peer_address:
            source = None
        if max_tokens is not None:
            needed_blocks = -(-(max_tokens - call.start_tokens) // size)
            what = f"a payload of {max_tokens} tokens"
    if ranks > 1:
        needed_blocks *= ranks
        what += f" for {ranks} ranks"
    if needed_blocks > worker.WINDOW_BLOCKS_MAX:
        raise FerryError(
            Code.WINDOW_TOO_LARGE,
            f"{what} needs {needed_blocks} blocks; a window has {worker.WINDOW_BLOCKS_MAX} at most",
        )
    quota = book.quota(key.role)
    if needed_blocks > quota:
        raise FerryError(
            Code.WINDOW_TOO_LARGE,
            f"{what} needs {needed_blocks} blocks; the pool gives {key.role}s {quota}",
        )
    return Opening(
        key=key,
        session=session.secret,
        pool_id=session.pool_id,
        window_tokens=window_blocks * size,
        block_size_tokens=size,
        start_tokens=call.start_tokens,
        source=source,
        max_tokens=max_tokens,
        aux_names=book.layout.aux,
        rank=call.rank,
        world_size=ranks,
        traceparent=call.traceparent,
        chunk_tokens=max(1, settings.chunk_bytes // book.layout.block_bytes) * size,
    )


def timing_of(call: worker.Send | worker.Receive, settings: Settings) -> Timing:
    """The deadlines of one transfer: the daemon's, where the call names no others.

    Raises FerryError(bad_deadline) for one beyond what the operator allows.
    """
    timing = settings.timing
    own = ("lease_s", call.lease_s) if isinstance(call, worker.Send) else ("hold_s", call.hold_s)
    asked = {name: s for name, s in (("stall_s", call.stall_s), own) if s is not None}
    for name, value in asked.items():
        low = 2 * timing.heartbeat_s if name == "lease_s" else 0.0  # it lives by pings
        if not low <= value <= settings.deadline_max_s:
            raise FerryError(
                Code.BAD_DEADLINE,
                f"{name} {value:g} is not between {low:g} and {settings.deadline_max_s:g}",
            )
    return replace(timing, **asked) if asked else timing


def checked_address(address: str | None) -> str | None:
    """Return the address if it is tcp://host:port (or None); raise FerryError(bad_address)."""
    if address is None:
        return None
    match = ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise FerryError(Code.BAD_ADDRESS, f"{address!r} is not tcp://host:port")
    return address


def check_key(source: str | None, ours: str) -> None:
    """Raise FerryError(bad_address) unless both ends have keys, or neither."""
    if source is not None and ("?key=" in source) != ("?key=" in ours):
        has, lacks = ("the source's", "ours") if "?key=" in source else ("ours", "the source's")
        raise FerryError(
            Code.BAD_ADDRESS,
            f"{has} is an address with a key, and {lacks} is not: daemons talk either with keys on "
            "both sides or in clear",
        )


def _checked_max(call: worker.Receive) -> int | None:
    if call.mode is Mode.CONSUME:
        return None
    if call.max_tokens is None or call.max_tokens < call.start_tokens:
        raise FerryError(
            Code.BAD_MESSAGE,
            f"whole mode needs max_tokens of at least start_tokens, got {call.max_tokens}",
        )
    return call.max_tokens
