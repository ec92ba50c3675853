"""A sink whose source is in this daemon: blocks change owner, or are copied.

Which of both is found out when the two meet. Copies are pulled, claimed and served like what comes
over a network, on a stream of their own that has no connection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvferry_daemon.core import events as ev
from kvferry_daemon.core.shape import Side
from kvferry_daemon.core.sink import SinkTransfer
from kvferry_daemon.core.tenants import not_yours
from kvferry_proto.errors import FerryError
from kvferry_proto.states import Role

if TYPE_CHECKING:
    from kvferry_daemon.core.node import AnyTransfer, Node


def can_take_over(source: AnyTransfer, sink: AnyTransfer) -> bool:
    """Whether blocks can change owner, rank by rank. A pool has one layout."""
    same_pool = source.opening.pool_id == sink.opening.pool_id
    return same_pool and source.ranks.size == sink.ranks.size


class Here:
    """Brings the two sides of a transfer together."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def pull(self, event: ev.Pulled) -> None:
        """A sink of ours asks; that its source has not come is an answer, too."""
        node = self._node
        key = ev.Key(Role.SOURCE, event.pull.transfer_id, event.pull.attempt)
        sink_key = key._replace(role=Role.SINK)
        source, sink = node.transfers.get(key), node.transfers.get(sink_key)
        if node.workers.openings.are_strangers(key, sink_key):
            refusal = not_yours(key.transfer_id)
            node.post(sink_key, ev.Fail(refusal.code, refusal.message))
            return
        meet = source is not None and isinstance(sink, SinkTransfer) and sink.takes_over
        if source is None or sink is None or not meet or can_take_over(source, sink):
            node.post(key, event)
            return
        try:
            ours, theirs = node.plans.kept.shapes(self._side(source), self._side(sink))
        except FerryError as error:
            node.post(sink_key, ev.Fail(error.code, error.message))
            return
        node.post(sink_key, ev.Copied(ev.StreamKey.here(node.settings.boot_id), theirs))
        node.post(key, replace(event, shape=ours))

    def _side(self, transfer: AnyTransfer) -> Side:
        layout = self._node.books[transfer.opening.pool_id].layout
        return Side.of(layout, transfer.ranks.size)
