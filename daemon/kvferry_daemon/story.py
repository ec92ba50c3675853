"""An explanation in words: for each attempt where it is, why, what helps, and its timeline."""

import time
from collections.abc import Iterator

from kvferry_daemon.operator import error_in_words, page, table
from kvferry_proto import control


def story(answer: control.Explanation) -> str:
    """Everything, oldest attempt first."""
    now = time.time()
    return "\n".join(_one(each, now) for each in answer.transfers)


def _one(each: control.Explained, now: float) -> str:
    rows = (
        (
            _clock(now - moment.ago_s),
            f"-{moment.ago_s:.3f} s",
            str(moment.sent_tokens),
            f"{moment.base_tokens}+{moment.allocated_tokens}",
            moment.what,
        )
        for moment in each.moments
    )
    names = ("time", "ago", "sent", "window", "what happened")
    return page(list(_words(each)), table(names, rows))


def _words(each: control.Explained) -> Iterator[str]:
    row, seen = each.seen, each.seen.snapshot
    total = "?" if seen.total_tokens is None else seen.total_tokens
    state = seen.state.name.title().replace("_", "")
    yield f"{seen.transfer_id}, {seen.role.value}, attempt {seen.attempt}: {state}, " + (
        f"{seen.sent_tokens} of {total} tokens, snapshot {seen.snapshot}"
    )
    if row.worker or row.source or row.sink:
        source = f"; its source's daemon is {row.source}" if row.source else ""
        source += f"; the sink's daemon is {row.sink}" if row.sink else ""
        by = f" by {row.transport}" if row.transport else ""
        yield f"  worker {row.worker or 'without a name'}{source}{by}"
    if row.workers:
        yield f"  its ranks' workers: {', '.join(name or 'not here' for name in row.workers)}"
    if seen.error is not None:
        yield f"  failed: {error_in_words(seen.error)}"
    if each.waits_for:
        since = "" if each.stalled_s is None else f", for {each.stalled_s:.1f} s"
        yield f"  waits for {each.waits_for}{since}"
    if row.behind:
        yield f"  behind: rank {', '.join(map(str, row.behind))}"
    if each.waits_for and each.helps:
        yield f"  what usually helps: {each.helps}"
    if each.holding:
        yield f"  blocks: {each.holding}"
    for holder in each.holders:
        why = f", {holder.stall.value}" if holder.stall else ""
        side = f"{holder.role.value}, attempt {holder.attempt}"
        yield f"    {holder.blocks} blocks are with {holder.transfer_id} ({side}{why})"
    if each.moments_lost:
        yield f"  {each.moments_lost} earlier changes are not kept"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at * 1000) % 1000:03d}"
