"""Where fuzzed bytes go in, and what must hold whatever they are. Each target raises if it does not."""

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any, Protocol
from zlib import crc32

from core.stories import SINK, SOURCE, Story
from fuzz.files import Files
from fuzz.kept import kept
from fuzz.mutate import mutated
from fuzz.seeds import golden, golden_board, half_told, told
from fuzz.sockets import Sockets
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Timing
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.past import LedgerWrong, Past
from kvferry_daemon.core.settings import Settings
from kvferry_proto import control, peer, worker
from kvferry_proto.board import SLOT_BYTES, WORD_BYTES, unpack_slot
from kvferry_proto.chunk import (
    ACCEPT_BYTES,
    PAYLOAD_BYTES_MAX,
    TICKET_BYTES,
    TOKENS_MAX,
    BadChunk,
    ChunkHeader,
    pack_accept,
    pack_greeting,
    read_accept,
    read_greeting,
    read_header,
    sealed,
)
from kvferry_proto.codec import Codec
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.offer import (
    METADATA_BYTES_MAX,
    ByeFrame,
    OfferFrame,
    PoolFrame,
    ReadFrame,
    StoodFrame,
    read_frame,
    read_runs,
)
from world import BLOCK

CODECS: tuple[Codec[Any], ...] = (
    worker.CALLS, worker.REPLIES, peer.MESSAGES, control.REQUESTS, control.ANSWERS
)  # fmt: skip
NIXL_FRAMES = (
    PoolFrame(1, 0, 1 << 40, 1 << 16, 64, b"metadata"), OfferFrame(3, 8192, 128, 1, ((0, 2), (9, 1))),
    ReadFrame(3, 8192), StoodFrame(3, 8192), ByeFrame(),
)  # fmt: skip
LIFE_FRAMES = 100  # then a daemon begins anew: most have lost their link or their transfer by then


class Target(Protocol):
    """Takes one frame a call."""

    def __call__(self) -> bytes: ...

    def close(self) -> None: ...


class Inside:
    """A target without anything to close."""

    def close(self) -> None:
        """The round is over."""


class Decoding(Inside):
    """A frame is a message, which is written and read back as itself, or is refused in one way."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._seeds, refused = golden()
        self._others = (*self._seeds, *refused, *kept("worker"), *kept("peer"))

    def __call__(self) -> bytes:
        frame = mutated(self._dice.choice(self._seeds), self._dice, self._others)
        self.check(frame)
        return frame

    def check(self, frame: bytes) -> None:
        for codec in CODECS:
            message = decoded(codec, frame)
            if message is not None:
                assert repr(codec.decode(codec.encode(message))) == repr(message)


def decoded(codec: Codec[Any], frame: bytes) -> Any:
    """The message; None if it is refused, which has to be with words of a bounded length."""
    try:
        return codec.decode(frame)
    except FerryError as refused:
        said = refused
    assert said.code is Code.BAD_MESSAGE, said
    assert 0 < len(said.message) <= 300
    return None


class Bytes(Inside):
    """Frames of data connections, and slots of a status board: whole as they were, or nothing.

    Half of them are sealed anew: who means harm knows how to, and what a seal does not stop has to
    be a frame within our limits.
    """

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._slots = [one for one in golden_board() if len(one) == SLOT_BYTES]
        header = ChunkHeader(3 * peer.PARTS_MAX, 8192, 128, 1 << 20, True).pack()
        accept = pack_accept(True).ljust(64, b"\0")
        nixl = [one.pack()[:64] for one in NIXL_FRAMES]
        self.heads = [header, pack_greeting(b"t" * 32), accept, *nixl, *kept("head")]

    def __call__(self) -> bytes:
        slot = mutated(self._dice.choice(self._slots), self._dice, self._slots)
        slot = slot[:SLOT_BYTES].ljust(SLOT_BYTES, b"\0")
        head = mutated(self._dice.choice(self.heads), self._dice, self.heads)[:64].ljust(64, b"\0")
        if self._dice.random() < 0.5:
            self.check_slot(slot)
            self.check_head(head)
        else:
            unpack_slot(resealed_slot(slot))
            self.check_frame(sealed(head[:60]))
            with suppress(BadChunk):
                read_runs(slot[: len(slot) // 16 * 16], self._dice.choice((1, 64, 1 << 22)))
        return head

    def check_slot(self, data: bytes) -> None:
        assert unpack_slot(data) is None or data in self._slots

    def check_head(self, data: bytes) -> None:
        with suppress(BadChunk):
            assert read_header(data).pack() == data
        with suppress(BadChunk):
            assert pack_greeting(read_greeting(data)) == data
        with suppress(BadChunk):
            read_accept(data[:ACCEPT_BYTES])

    def check_frame(self, data: bytes) -> None:
        with suppress(BadChunk):
            header = read_header(data)
            assert 0 < header.payload_bytes <= PAYLOAD_BYTES_MAX
            assert 0 < header.tokens <= TOKENS_MAX
        with suppress(BadChunk):
            assert len(read_greeting(data)) == TICKET_BYTES
        with suppress(BadChunk):
            found = read_frame(data)
            assert found is None or found[1] <= METADATA_BYTES_MAX


def resealed_slot(data: bytes) -> bytes:
    """A slot whose checksum is right, whatever it says."""
    body = data[:-WORD_BYTES]
    return body + crc32(body).to_bytes(WORD_BYTES, "little")


class Lives(Inside):
    """Two daemons in the middle of a transfer, and frames that one of them is sent.

    Whatever comes: nothing is raised, the books of the pools add up, and who is refused has changed
    no transfer.
    """

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._left = 0

    def __call__(self) -> bytes:
        if not self._left:
            self._begin()
        self._left -= 1
        name, wrap, codec, seeds = self._dice.choice(self._ways)
        frame = mutated(self._dice.choice(seeds), self._dice, seeds)
        message = decoded(codec, frame)
        if message is not None:
            self._feed(self._story.world.machines[name].node, wrap(message))
        return frame

    def _begin(self) -> None:
        self._story = half_told(Story(8 * BLOCK))
        self._left = LIFE_FRAMES
        all_ = told()
        calls, said = (*all_.calls, *kept("worker")), (*all_.to_source, *kept("peer"))
        self._ways: tuple[
            tuple[str, Callable[[Any], out.NodeEvent], Codec[Any], Sequence[bytes]], ...
        ]
        self._ways = (
            ("a", lambda call: out.WorkerCalled(SOURCE, call, True), worker.CALLS, calls),
            ("b", lambda call: out.WorkerCalled(SINK, call, True), worker.CALLS, calls),
            ("b", lambda call: out.WorkerCalled(b"new", call, False), worker.CALLS, calls),
            ("a", lambda one: out.SinkSaid(b"b", one), peer.MESSAGES, said),
            ("b", lambda one: out.SourceSaid("tcp://a:1", one), peer.MESSAGES, all_.to_sink),
        )  # fmt: skip

    def _feed(self, node: Node, event: out.NodeEvent) -> None:
        now_s = self._story.world.now_s
        node.handle(out.TimePassed(), now_s)  # what is due comes first
        before = _marks(node)
        effects = self.handle(node, event, now_s)
        node.check()
        if _is_refused(event, effects):
            assert _marks(node) == before, event
        for effect in effects:
            if isinstance(effect, out.Zero):
                node.handle(out.Zeroed(effect.ticket), now_s)
            elif isinstance(effect, out.MakePool):
                node.handle(out.PoolMade(effect.pool_id, "/pool"), now_s)
        node.check()

    def handle(self, node: Node, event: out.NodeEvent, now_s: float) -> list[out.NodeEffect]:
        return node.handle(event, now_s)


def _marks(node: Node) -> dict[Any, Any]:
    return {key: transfer.mark() for key, transfer in node.transfers.items()}


def _is_refused(event: out.NodeEvent, effects: list[out.NodeEffect]) -> bool:
    replies = [effect.reply for effect in effects if isinstance(effect, out.ToWorker)]
    if isinstance(event, out.WorkerCalled):
        return any(isinstance(reply, worker.Failure) for reply in replies)
    return any(
        isinstance(effect, out.ToSink) and isinstance(effect.message, peer.PeerRefused)
        for effect in effects
    )


class Ledgers(Inside):
    """Rows of a ledger: a daemon goes on from them, or says that they are wrong."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._rows = told().rows
        self._bodies = [*(body for _, body in self._rows), *kept("row")]

    def __call__(self) -> bytes:
        rows, name = self.changed()
        self.check(rows)
        return rows[name]

    def changed(self) -> tuple[dict[str, bytes], str]:
        """The first rows of a ledger, one of them mutated, and which."""
        dice = self._dice
        rows = dict(self._rows[: dice.randrange(1, len(self._rows) + 1)])
        name = dice.choice(list(rows))
        rows[name] = mutated(rows[name], dice, self._bodies)
        return rows, name

    def check(self, rows: dict[str, bytes]) -> None:
        try:
            node = restored(rows)
        except LedgerWrong:
            return
        for now_s in (0.0, 0.3, 5.0, 100.0):  # it lives, and its transfers end by their deadlines
            node.handle(out.TimePassed(), now_s)
            node.check()


def restored(rows: dict[str, bytes]) -> Node:
    """A node that goes on from a ledger's rows; LedgerWrong."""
    past = Past()
    for name, body in rows.items():
        past.add(name, body)
    past.check()
    node = Node(_settings(), lambda: secrets.token_bytes(32), 0, 0.0)
    node.handle(out.Restored(past), 0.0)
    return node


def _settings() -> Settings:
    return Settings(
        boot_id="b" * 16, daemon_id="b" * 16, life=2, pools_dir="/pools", peer_address="tcp://b:1",
        timing=Timing(), window_tokens=8, budget_bytes=1 << 30, pool_tokens=64, source_share=0.5,
        streams=1, chunk_bytes=1, transfers_max=100, workers_max=10,
    )  # fmt: skip


TARGETS: dict[str, Callable[[Random], Target]] = {
    "decoding": Decoding, "bytes": Bytes, "lives": Lives, "ledgers": Ledgers, "files": Files,
    "sockets": Sockets,
}  # fmt: skip
