"""The contract for engines: page tables in, windows out.

An engine keeps the KV cache in pages of its own and finds a request's through a block table. A
``Ferry`` stands beside one engine worker, in a thread of its own, so that no step of the engine
ever waits for a daemon. Prefill opens a ``send`` and says after each step how many tokens are
computed, or while it runs which planes are; decode opens a ``receive`` and looks whether it has
ended. Either may free or use its pages as soon as ``ended`` is true, and must not before.

Not imported by ``kvferry_client`` itself: it needs torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvferry_client.engine_outgoing import ForwardPass, Outgoing, Withdrawn
from kvferry_client.engine_pages import NO_BLOCK, Pages, Tables
from kvferry_client.engine_sides import NOTHING, Identity, Incoming, Side
from kvferry_client.engine_thread import FerryThread
from kvferry_client.paged import CachePlane, PagedCache
from kvferry_proto.layout import Dtype, Layout, Order, Plane

__all__ = [
    "NO_BLOCK", "Ferry", "ForwardPass", "Incoming", "Outgoing", "Side", "Tables", "layout_of",
]  # fmt: skip


def layout_of(
    groups: Sequence[Mapping[str, CachePlane]],
    *,
    heads_total: Mapping[str, int] | None = None,
    block_size_tokens: int = 128,
    identity: Sequence[str] = (),
    aux: Sequence[str] = (),
) -> Layout:
    """The layout that carries the planes of an engine's caches, in their order.

    ``heads_total``: of planes whose first axis are heads, how many there are over all ranks.
    ``block_size_tokens``: of the daemon's pool; the engine's own block size may be any other.
    ``identity``: the names of what both sides tell of each transfer, and must tell alike.
    ``aux``: names of values that a payload carries once, with its last tokens. ValueError for both:
    one is told with the first tokens and the other with the last, and all are told at once.
    """
    if identity and aux:
        raise ValueError("a layout has an identity or aux values, not both")
    totals = heads_total or {}
    planes = []
    for name, (tensor, order) in ((name, one) for group in groups for name, one in group.items()):
        shape = list(tensor.shape[1:])
        del shape[1 if order is Order.HND else 0]  # the tokens of a block
        planes.append(
            Plane(
                name=name,
                dtype=Dtype(str(tensor.dtype).removeprefix("torch.")),
                shape=tuple(shape),
                heads_total=totals.get(name),
                order=order,
            )
        )
    return Layout(planes=tuple(planes), block_size_tokens=block_size_tokens, aux=(*identity, *aux))


class Ferry(FerryThread):
    """One engine worker's thread for moving pages. Its methods return at once, from any thread."""

    def __init__(
        self,
        runtime_dir: Path | str,
        layout: Layout,
        caches: Sequence[PagedCache],
        *,
        name: str = "",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Begin to join the daemon of a runtime directory; it may come later.

        ``caches``: one for each kind of block table that the engine has, one mostly. ``rank`` of
        ``world_size``: which worker this is of a tensor-parallel group.
        """
        self._pages = Pages(caches, layout.block_size_tokens, rank, world_size)
        super().__init__(runtime_dir, layout, name, self._pages)

    def send(
        self,
        transfer_id: str,
        *,
        total_tokens: int | None,
        attempt: int = 0,
        identity: Identity = NOTHING,
        traceparent: str | None = None,
    ) -> Outgoing:
        """Send a request's pages as they are computed: see ``Outgoing.computed``.

        ``total_tokens``: None if it is told with the last of them.
        ``identity``: what the payload is of, such as the model; one text for each name of the layout.
        ``traceparent``: the request's W3C trace context, for a daemon that makes traces.
        """
        side = Outgoing(self._pages, transfer_id, attempt, identity, total_tokens)
        side.traceparent = traceparent
        self.start(side)
        return side

    def withdraw(self, transfer_id: str, reason: str, *, attempt: int = 0) -> Side:
        """Nothing will be sent: a decode that waits for it fails with ``reason``, and at once."""
        side = Withdrawn(self._pages, transfer_id, attempt, NOTHING)
        side.reason = reason
        self.start(side)
        return side

    def forward_pass(self) -> ForwardPass:
        """The engine's next pass through its layers: see ``Outgoing.computing``."""
        return ForwardPass(self._pages, self.tell)

    def receive(
        self,
        transfer_id: str,
        *,
        source: str | None,
        tables: Tables,
        first_token: int,
        end_token: int,
        least_tokens: int | None = None,
        attempt: int = 0,
        identity: Identity = NOTHING,
        traceparent: str | None = None,
    ) -> Incoming:
        """Fetch tokens [first_token, end_token) of a payload of ``end_token`` into an engine's pages.

        ``least_tokens``: the payload may be as short as this, where an engine knows its pages only.

        No other token is written, so that pages may be shared below ``first_token``. None at all
        tells the source that nobody will fetch what it holds. Where the source tells another
        ``identity``, nothing is written, and the error has what differs. ``traceparent``: see ``send``.
        """
        tokens = range(first_token, end_token)
        side = Incoming(self._pages, transfer_id, attempt, identity, source, tables, tokens)
        side.least_tokens = end_token if least_tokens is None else least_tokens
        side.traceparent = traceparent
        self.start(side)
        return side
