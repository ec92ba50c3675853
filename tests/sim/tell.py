"""A story in few words: what a node was told and what it wanted, without what nobody asks about."""

from __future__ import annotations

from kvferry_daemon.core import outside as out
from kvferry_daemon.core import peer_effects as pr
from kvferry_daemon.core.events import Key, StreamKey
from kvferry_proto import peer, worker
from kvferry_proto.fields import ErrorInfo
from kvferry_proto.fields import Message as Value

DULL = (peer.Ping, peer.Pong, worker.Heartbeat, worker.Poll)


def is_dull(about: object) -> bool:
    """What happens all the time."""
    match about:
        case out.TimePassed():
            return True
        case out.WorkerCalled():
            return isinstance(about.call, DULL)
        case out.ToWorker():
            return isinstance(about.reply, worker.Snapshots) and not about.reply.transfers
        case out.SourceSaid() | out.SinkSaid() | out.ToSink() | pr.Say():
            return isinstance(about.message, DULL)
        case worker.Snapshots():
            return not about.transfers and not about.refused
    return False


def short(about: object) -> str:
    """One event, effect or message."""
    match about:
        case out.WorkerCalled():
            return f"{_route(about.route)} calls {short(about.call)}"
        case out.ToWorker():
            return f"to {_route(about.route)}: {short(about.reply)}"
        case out.SourceSaid():
            return f"source {about.address[6]} says {short(about.message)}"
        case out.SinkSaid():
            return f"sink {_route(about.route)} says {short(about.message)}"
        case out.ToSink():
            return f"to sink {_route(about.route)}: {short(about.message)}"
        case pr.Say():
            return f"to source {about.address[6]}: {short(about.message)}"
        case worker.Snapshots():
            return " | ".join([_snapshot(s) for s in about.transfers] + [
                f"refused {r.role} {r.transfer_id}/{r.attempt} {r.error.code}" for r in about.refused
            ]) or "nothing new"  # fmt: skip
        case peer.Pulls():
            return "pulls " + "; ".join(_pull(p) for p in about.pulls)
        case peer.Progresses():
            return "progresses " + "; ".join(_progress(p) for p in about.progresses)
        case worker.Failure():
            return f"FAILURE {about.error.code}: {about.error.message}"
        case Value():
            return f"{type(about).__name__}({_fields(about)})"
        case out.Expect() | out.Transmit():
            runs = ",".join(f"{first}+{blocks}" for first, blocks in about.place.runs)
            return (
                f"{type(about).__name__} handle {about.handle} tokens {about.first_token}"
                f"+{about.tokens} blocks {runs} on {_stream(about.key)}"
            )
    return str(about)


def _route(route: bytes) -> str:
    return route.decode(errors="replace")


def _stream(key: StreamKey) -> str:
    return f"{key.peer.removeprefix('tcp://')[0]}.{key.stream}.{key.connection}"


def _snapshot(s: worker.Snapshot) -> str:
    runs = ",".join(f"{first}+{blocks}" for first, blocks in s.runs)
    error = f" {s.error.code}" if s.error else ""
    return (
        f"{s.role} {s.transfer_id}/{s.attempt} #{s.snapshot} {s.state.name}{error} {s.stall or ''} "
        f"sent {s.sent_tokens} resumed {s.last_resume_at} available {s.available_tokens} "
        f"total {s.total_tokens} base {s.base_tokens} target {s.target_tokens} blocks {runs}"
    )


def _pull(p: peer.Pull) -> str:
    wants = " ".join(f"{w.first_token}+{w.tokens}@{w.stream}.{w.connection}" for w in p.want)
    return f"{p.transfer_id}/{p.attempt} #{p.number} acked {p.acked_tokens} wants [{wants}]"


def _progress(p: peer.Progress) -> str:
    error = f" {p.error.code}" if p.error else ""
    known = "" if p.known else " UNKNOWN"
    return (
        f"{p.transfer_id}/{p.attempt} #{p.number}{known} {p.state.name}{error} "
        f"available {p.available_tokens} total {p.total_tokens}"
    )


def _fields(message: Value) -> str:
    shown = []
    for name in type(message).model_fields:
        value = getattr(message, name)
        if isinstance(value, ErrorInfo):
            value = value.code
        if name in ("call", "layout", "kind", "versions", "lock", "pid", "worker", "ticket"):
            continue
        if value is not None and value != "":
            shown.append(f"{name}={value}")
    return " ".join(shown)


def line(at_s: float, who: object, what: str, about: object) -> str | None:
    """A line of a story, or None where nothing is worth a line."""
    if is_dull(about):
        return None
    if isinstance(who, Key):
        who = f"{who.role} {who.transfer_id}/{who.attempt}"
    return f"{at_s:9.4f} {who} {what} {short(about)}"
