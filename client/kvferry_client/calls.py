"""The calls that open a transfer, checked; and what their keyword arguments are."""

from numbers import Integral
from typing import Any, TypedDict, TypeVar

from pydantic import BaseModel, ValidationError

from kvferry_proto import worker
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.states import Mode

M = TypeVar("M", bound=BaseModel)
REASON_CHARS_MAX = 1000


class SendOptions(TypedDict, total=False):
    """How to send.

    ``attempt``: the router's retry number, the same on both sides. ``start_tokens``: the first
    token that this side has, a multiple of the block size. ``total_tokens``, ``aux``: if known
    already. ``window_tokens``: how much of the pool to fill ahead of the sink. ``rank``,
    ``world_size``: which worker this is of a group that sends one payload together. ``stall_s``,
    ``lease_s``: fail after so long without progress, or without a word of the sink; the daemon's
    own where they are not given. ``traceparent``: the W3C trace context of the request, for a daemon
    that makes traces.
    """

    attempt: int
    rank: int
    world_size: int
    start_tokens: int
    total_tokens: int | None
    aux: dict[str, Any] | None
    window_tokens: int | None
    stall_s: float | None
    lease_s: float | None
    traceparent: str | None


class ReceiveOptions(TypedDict, total=False):
    """How to receive.

    ``source``: the source daemon's peer address; None is this daemon. ``mode``: CONSUME takes
    window after window over, WHOLE keeps everything and needs ``max_tokens``. ``start_tokens``:
    the first token to move, a multiple of the block size. ``rank``, ``world_size``: which worker
    this is of a group that receives one payload together; all take the same windows over.
    ``stall_s``, ``hold_s``: fail after so long without progress; keep the window so long after the
    end; the daemon's own where they are not given. ``traceparent``: the W3C trace context of the
    request; the source's daemon hears of it, too.
    """

    source: str | None
    attempt: int
    rank: int
    world_size: int
    mode: Mode
    start_tokens: int
    window_tokens: int | None
    max_tokens: int | None
    stall_s: float | None
    hold_s: float | None
    traceparent: str | None


def made(kind: type[M], fields: dict[str, Any]) -> M:
    """Build a call; FerryError(bad_message) names the first field that is wrong.

    numpy's integers are taken for what they are.
    """
    try:
        return kind(**{name: _plain(value) for name, value in fields.items()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FerryError(
            Code.BAD_MESSAGE, f"{kind.__name__.lower()}: {where}: {first['msg']}"[:300]
        ) from None


def send_call(transfer_id: str, options: SendOptions) -> worker.Send:
    """The call that opens a source side."""
    return made(worker.Send, {"transfer_id": transfer_id, **options})


def receive_call(transfer_id: str, options: ReceiveOptions) -> worker.Receive:
    """The call that opens a sink side."""
    return made(worker.Receive, {"transfer_id": transfer_id, **options})


def reason_of(words: str) -> str:
    """An abort's reason as the wire takes it: any exception's text must do."""
    return words[:REASON_CHARS_MAX].encode(errors="replace").decode()


def _plain(value: Any) -> Any:
    return (
        int(value) if isinstance(value, Integral) and not isinstance(value, bool | int) else value
    )
