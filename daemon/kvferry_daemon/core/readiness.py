"""What a source's worker may say of its tokens, and what ranks of a group must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry_daemon.core.aux_values import difference
from kvferry_daemon.core.events import ReadyTo
from kvferry_proto.errors import Code, FerryError

if TYPE_CHECKING:
    from kvferry_daemon.core.source import SourceTransfer


def check_ready(source: SourceTransfer, event: ReadyTo) -> None:
    """Raise FerryError for a ReadyTo that would be refused."""
    rank = source.ranks[event.rank]
    known = source.total_tokens if source.ranks.size == 1 else rank.total_tokens
    total = known if event.total_tokens is None else event.total_tokens
    ready = max(event.ready_tokens, rank.level_tokens)
    if known is not None and total != known:
        raise FerryError(Code.TOTAL_CHANGED, f"total_tokens was {known}, now {total}")
    if total is not None and total < ready:
        raise FerryError(
            Code.TOTAL_TOO_SMALL, f"total_tokens {total} is below the {ready} tokens ready"
        )
    if event.ready_tokens > max(source.window.edge_tokens, source.opening.start_tokens):
        raise FerryError(
            Code.READY_BEYOND_WINDOW,
            f"ready_tokens {event.ready_tokens}, but the window ends at "
            f"{source.window.edge_tokens}",
        )
    last = ready == total and ready > source.opening.start_tokens
    # Of a group another rank may tell the aux values, also when this one is done.
    _refuse_bad_aux(source, event, is_last=last and source.ranks.size == 1)


def total_mismatch(source: SourceTransfer, event: ReadyTo) -> str | None:
    """Ranks that disagree on the length: both numbers, and who said them."""
    known, told = source.total_tokens, event.total_tokens
    if known is not None and told not in (None, known):
        teller = next(
            n for n in range(source.ranks.size) if source.ranks[n].total_tokens is not None
        )
        return f"rank {event.rank} says {told} tokens in all, rank {teller} said {known}"
    total = told if known is None else known
    for number in range(source.ranks.size):
        ready = source.ranks[number].level_tokens
        if number == event.rank:
            ready = max(ready, event.ready_tokens)
        if total is not None and ready > total:
            return f"rank {number} has {ready} tokens ready, but they are {total} in all"
    return None


def _refuse_bad_aux(source: SourceTransfer, event: ReadyTo, *, is_last: bool) -> None:
    aux, names = event.aux, source.opening.aux_names
    if aux is not None and source.aux is not None and aux != source.aux:
        raise FerryError(Code.AUX_CHANGED, difference(source.aux, aux))
    if aux is not None and set(aux) != set(names):
        raise FerryError(Code.AUX_MISSING, f"the layout has aux {sorted(names)}, got {sorted(aux)}")
    if is_last and names and aux is None and source.aux is None:
        raise FerryError(
            Code.AUX_MISSING, f"the last token is ready, but aux {sorted(names)} is not told"
        )
