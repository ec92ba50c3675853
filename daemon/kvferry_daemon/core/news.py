"""What a sink must not believe of what its source's daemon says."""

from kvferry_daemon.core.transfer import Transfer
from kvferry_proto.errors import Code
from kvferry_proto.peer import Progress
from kvferry_proto.states import State

OURS_TOO = (Code.STALE_ATTEMPT, Code.START_MISMATCH, Code.LAYOUT_MISMATCH, Code.SINK_TAKEN)


def what_is_wrong(sink: Transfer, news: Progress) -> tuple[Code, str] | None:
    """Why the transfer has to end with this news; None if it may go on."""
    if news.error is not None and news.error.code in OURS_TOO:
        return Code(news.error.code), news.error.message
    if news.error is not None or news.state is State.FAILED:
        said = news.error
        return Code.SOURCE_FAILED, f"{said.code}: {said.message}" if said else "no reason given"
    if news.state is State.SUCCESS:
        return Code.SOURCE_LOST, "the source has ended, and its payload went elsewhere"
    total, known = news.total_tokens, sink.total_tokens
    if total is not None and known is not None and total != known:
        return Code.TOTAL_CHANGED, f"the source said {known} tokens, then {total}"
    end = max(total or 0, news.available_tokens)
    limit = sink.opening.max_tokens
    if limit is not None and end > limit:
        return Code.MAX_TOKENS_EXCEEDED, f"the payload has {end} tokens or more, over {limit}"
    most = max(sink.sent_tokens, sink.available_tokens, news.available_tokens)
    told = known if total is None else total
    if told is not None and told < most:
        return Code.TOTAL_TOO_SMALL, f"total {told}, but {most} tokens are there already"
    return None
