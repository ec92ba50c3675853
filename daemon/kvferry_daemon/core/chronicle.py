"""Tells the shell how transfers go: always when one begins and ends, and where traces are on, more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry_daemon.core import told
from kvferry_daemon.core.events import Key, Pulled, StreamKey
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node

Chunk = tuple[Key, int, int]  # whose, part, first token


@dataclass(slots=True, eq=False)
class Batch:
    """Chunks that one transfer asked for, or began to serve, in one event."""

    key: Key
    began_s: float
    first_token: int
    tokens: int = 0
    chunks: int = 0
    left: int = 0
    missed: int = 0


@dataclass(slots=True)
class Standing:
    """A window while its base stays where it is."""

    began_s: float
    base_tokens: int
    edge_tokens: int


class Chronicle:
    """One a node."""

    def __init__(self, node: Node, *, traced: bool) -> None:
        """``traced``: windows and batches of chunks are told, too."""
        self._node = node
        self.traced = traced
        self._windows: dict[Key, Standing] = {}
        self._batches: dict[Key, list[Batch]] = {}  # those that are under way
        self._chunks: dict[StreamKey, dict[Chunk, Batch]] = {}
        self._without_trace: set[Key] = set()

    def _tell(self, what: told.Told) -> None:
        self._node.effects.append(what)

    def opened(self, transfer: AnyTransfer, *, again: bool = False) -> None:
        """A transfer is in the books."""
        key, opening = transfer.key, transfer.opening
        session = self._node.sessions.get(opening.session)
        name = session.name if session else ""
        at_s = self._node.now_s if again else transfer.opened_s
        start, parent = opening.start_tokens, opening.traceparent
        self._tell(told.TransferOpened(key, at_s, name, opening.source, start, parent, again))
        if self.traced and parent is None and key.role is Role.SOURCE:
            self._without_trace.add(key)

    def ended(self, transfer: AnyTransfer) -> None:
        """It has come to its end."""
        key, now_s = transfer.key, self._node.now_s  # not the transfer's own, which may lag
        if self.traced:
            self._leave_window(transfer)
            for batch in self._batches.pop(key, ()):
                batch.missed += batch.left
                self._tell_batch(batch)
            self._without_trace.discard(key)
        took_s = now_s - transfer.opened_s
        sent, total = transfer.sent_tokens, transfer.total_tokens
        self._tell(
            told.TransferEnded(key, now_s, took_s, transfer.state, transfer.error, sent, total)
        )

    # --- only where traces are on ---

    def handled(self, transfer: AnyTransfer, event: object) -> None:
        """A live transfer has handled an event."""
        key, window = transfer.key, transfer.window
        if isinstance(event, Pulled) and key in self._without_trace:
            parent = event.pull.traceparent
            if parent is not None:
                self._without_trace.discard(key)
                self._tell(told.TraceJoined(key, parent))
        standing = self._windows.get(key)
        if standing is not None and standing.base_tokens != window.base_tokens:
            self._leave_window(transfer)
            standing = None
        if standing is None and window.blocks:
            standing = Standing(self._node.now_s, window.base_tokens, window.edge_tokens)
            self._windows[key] = standing
        if standing is not None:
            standing.edge_tokens = max(standing.edge_tokens, window.edge_tokens)

    def _leave_window(self, transfer: AnyTransfer) -> None:
        standing = self._windows.pop(transfer.key, None)
        if standing is not None:
            self._tell(
                told.WindowMoved(
                    transfer.key,
                    standing.began_s,
                    self._node.now_s,
                    standing.base_tokens,
                    standing.edge_tokens,
                    transfer.sent_tokens,
                )
            )

    def chunk_begun(
        self, stream: StreamKey, key: Key, part: int, first_token: int, tokens: int
    ) -> None:
        """A chunk is asked for, or is to be sent."""
        if not self.traced:
            return
        now_s, batches = self._node.now_s, self._batches.setdefault(key, [])
        if not batches or batches[-1].began_s != now_s:
            batches.append(Batch(key, now_s, first_token))
        batch = batches[-1]
        batch.tokens += tokens
        batch.chunks += 1
        batch.left += 1
        self._chunks.setdefault(stream, {})[key, part, first_token] = batch

    def chunk_ended(
        self, stream: StreamKey, key: Key, part: int, first_token: int, *, missed: bool = False
    ) -> None:
        """It is in place, has left, or will not come."""
        if not self.traced:
            return
        under_way = self._chunks.get(stream, {})
        batch = under_way.pop((key, part, first_token), None)
        if not under_way:
            self._chunks.pop(stream, None)
        if batch is not None:
            self._count(batch, missed=missed)

    def stream_down(self, stream: StreamKey) -> None:
        """Nothing more comes or leaves on this connection."""
        for batch in self._chunks.pop(stream, {}).values():
            self._count(batch, missed=True)

    def _count(self, batch: Batch, *, missed: bool) -> None:
        batch.left -= 1
        batch.missed += missed
        batches = self._batches.get(batch.key, [])
        if batch.left or batch not in batches:  # told already, with its transfer's end
            return
        batches.remove(batch)
        if not batches:
            del self._batches[batch.key]
        self._tell_batch(batch)

    def _tell_batch(self, batch: Batch) -> None:
        now_s, began_s = self._node.now_s, batch.began_s
        sizes = (batch.first_token, batch.tokens, batch.chunks, batch.missed)
        self._tell(told.ChunksMoved(batch.key, began_s, now_s, *sizes))
