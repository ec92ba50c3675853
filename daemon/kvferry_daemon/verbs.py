"""The commands that ask a running daemon, or change something in it."""

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvferry_daemon.completion import known_ids
from kvferry_daemon.output import Exit, as_json, stop, stop_by, write
from kvferry_proto.errors import FerryError

if TYPE_CHECKING:
    from kvferry_proto import control

LOOK_S = 0.2  # at a drain
WATCH_S = 1.0
STATES = ["failed", "bootstrapping", "waiting_for_input", "transferring", "success"]
STALLS = [
    *("waiting_for_source", "waiting_for_input", "waiting_for_blocks", "waiting_for_resume"),
    *("waiting_for_peer", "draining"),
]
NO_ID = "1 to 128 printable ASCII characters without a space"
Command = Callable[..., None]


RUNTIME_DIR = click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path),
    envvar="KVFERRY_RUNTIME_DIR",
    help="the daemon's runtime directory",
)


def _asks(command: Command) -> Command:
    """The options of every command that talks to a daemon and answers."""
    with_json = click.option("--json", "json_wanted", is_flag=True, help="one JSON object")(command)
    return RUNTIME_DIR(with_json)


@click.command()
@_asks
def status(runtime_dir: Path | None, json_wanted: bool) -> None:
    """Show the daemon: pools, peers, workers, transfers by state."""
    from kvferry_daemon.status_words import status_for_people
    from kvferry_proto.control import GetStatus

    answer = _ask(runtime_dir, GetStatus())
    write(as_json("status", answer) if json_wanted else status_for_people(answer))


@click.command()
@_asks
@click.argument("transfer_id", required=False, shell_complete=known_ids)
@click.option("--state", type=click.Choice(STATES), help="only those in this state")
@click.option("--role", type=click.Choice(["source", "sink"]), help="only this side")
@click.option("--stall", type=click.Choice(STALLS), help="only those that wait for this")
@click.option("--worker", help="only those of the worker with this name")
@click.option("--peer", help="only those whose other side is at this daemon's address")
@click.option("--age-s", type=click.FloatRange(min=0), help="only those at least so old")
@click.option("--idle-s", type=click.FloatRange(min=0), help="only those so long without progress")
@click.option(
    "--sort",
    type=click.Choice(["opened", "age", "idle", "sent", "blocks"]),
    default="opened",
    show_default=True,
    help="what is most of it comes last",
)
@click.option("--limit", type=click.IntRange(1, 1000), default=1000, show_default=True)
@click.option("--watch", is_flag=True, help="every second, until interrupted; --json: a line each")
def transfers(
    runtime_dir: Path | None,
    json_wanted: bool,
    transfer_id: str | None,
    watch: bool,
    **filters: Any,
) -> None:
    """Show transfers, those that fit all filters, or every attempt of one id."""
    from kvferry_daemon.transfers_words import transfers_for_people
    from kvferry_proto.control import Explain, GetTransfers
    from kvferry_proto.states import State

    if filters["state"] is not None:
        filters["state"] = State[filters["state"].upper()]
    question = _made(GetTransfers, transfer_id=transfer_id, **filters)

    def show(*, line: bool = False) -> bool:
        answer = _ask(runtime_dir, question)
        if json_wanted:
            write(as_json("transfers", answer, line=line))
        elif answer.transfers or transfer_id is None:
            write(transfers_for_people(answer))
        return bool(answer.transfers)

    if watch:
        _again_and_again(lambda: show(line=True))
    elif not show() and transfer_id is not None:
        near = _ask(runtime_dir, _made(Explain, transfer_id=transfer_id)).near
        _stop_at_unknown(f"{transfer_id} like that", near)


@click.command()
@_asks
@click.argument("transfer_id", shell_complete=known_ids)
def explain(runtime_dir: Path | None, json_wanted: bool, transfer_id: str) -> None:
    """Tell where a transfer is and why: its timeline, what it waits for, and what usually helps."""
    from kvferry_daemon.story import story
    from kvferry_proto.control import Explain

    answer = _ask(runtime_dir, _made(Explain, transfer_id=transfer_id))
    if json_wanted:
        write(as_json("explain", answer))
    elif answer.transfers:
        write(story(answer))
    if not answer.transfers:
        _stop_at_unknown(transfer_id, answer.near)


@click.command()
@_asks
@click.option(
    "--wait-s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="for transfers to end and give their blocks back; 0 asks once",
)
def drain(runtime_dir: Path | None, json_wanted: bool, wait_s: float) -> None:
    """Take no new transfers, wait for the live ones, and name those that are left."""
    from kvferry_daemon.transfers_words import transfers_for_people
    from kvferry_proto.control import SetDraining

    until_s = time.monotonic() + wait_s
    answer = _ask(runtime_dir, SetDraining(draining=True))
    while answer.draining and answer.unsettled and time.monotonic() < until_s:
        time.sleep(LOOK_S)
        answer = _drain_now(runtime_dir)  # said again, it would undo what somebody else says
    left = _left(runtime_dir, answer.unsettled) if answer.unsettled else None
    if json_wanted:
        rows = [] if left is None else left.model_dump(mode="json")["transfers"]
        write(as_json("drain", {**answer.model_dump(mode="json"), "transfers": rows}))
    elif left is not None:
        write(transfers_for_people(left))
    elif answer.draining:
        write("drained: no transfer is live or holds a block; new ones are refused")
    if not answer.draining:
        words = "the daemon takes new transfers again: somebody said undrain, or it was restarted"
        stop(Exit.UNDRAINED, words)
    if answer.unsettled:
        words = f"{answer.unsettled} transfers are live or hold blocks after {wait_s:g} s; "
        stop(Exit.UNDRAINED, words + "explain or abort them, or let the daemon go on: undrain")


def _drain_now(runtime_dir: Path | None) -> "control.Draining":
    from kvferry_proto.control import Draining, GetStatus

    status = _ask(runtime_dir, GetStatus())
    return Draining(draining=status.draining, unsettled=status.unsettled)


def _left(runtime_dir: Path | None, unsettled: int) -> "control.Transfers":
    """Those that are live or hold blocks: the last ones of an answer, which remembers others."""
    from kvferry_proto.control import GetTransfers, Transfers

    answer = _ask(runtime_dir, GetTransfers(sort="blocks"))
    rows = [row for row in answer.transfers if row.blocks or not row.ended]
    more = max(0, unsettled - len(rows))
    return Transfers(transfers=rows, more=more)


@click.command()
@_asks
def undrain(runtime_dir: Path | None, json_wanted: bool) -> None:
    """Take new transfers again after `drain`."""
    from kvferry_proto.control import SetDraining

    answer = _ask(runtime_dir, SetDraining(draining=False))
    write(as_json("drain", answer) if json_wanted else "new transfers are taken again")


@click.command()
@_asks
@click.argument("transfer_id", shell_complete=known_ids)
@click.option("--attempt", type=click.IntRange(min=0), help="only this one [default: all]")
@click.option("--reason", default="", help="what its workers are told")
def abort(
    runtime_dir: Path | None, json_wanted: bool, transfer_id: str, attempt: int | None, reason: str
) -> None:
    """Give a transfer up; its workers see Failed, and its blocks drain as they always do."""
    from kvferry_proto.control import AbortTransfer

    fields = {"transfer_id": transfer_id, "attempt": attempt, "reason": reason}
    answer = _ask(runtime_dir, _made(AbortTransfer, **fields))
    if json_wanted:
        write(as_json("abort", answer))
        return
    for row in answer.transfers:
        seen = row.snapshot
        side = f"{seen.role.value}, attempt {seen.attempt}"
        write(f"aborted {seen.transfer_id} ({side}) at token {seen.sent_tokens}")


@click.group()
def logs() -> None:
    """What the daemon writes to its log."""


@logs.command()
@_asks
@click.argument("new", type=click.Choice(["debug", "info", "warning", "error"]), required=False)
def level(runtime_dir: Path | None, json_wanted: bool, new: Any) -> None:
    """Show the log level, or set it until the daemon ends."""
    from kvferry_proto.control import GetStatus, SetLogLevel

    if new is None:
        now = before = _ask(runtime_dir, GetStatus()).log_level
    else:
        answer = _ask(runtime_dir, SetLogLevel(level=new))
        now, before = answer.level, answer.before
    if json_wanted:
        write(as_json("logs", {"level": now, "before": before}))
    else:
        write(now if now == before else f"{now}, it was {before}")


@click.command()
@RUNTIME_DIR
def top(runtime_dir: Path | None) -> None:
    """Watch pools, peers, transfers and rates on a whole terminal. Keys: s, f, e, a, q."""
    from kvferry_proto.control import GetStatus

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        words = (
            "top needs a terminal; without one: `kvferry status` and `kvferry transfers --watch`"
        )
        stop(Exit.USAGE, words)
    if importlib.util.find_spec("textual") is None:
        stop(Exit.USAGE, "top needs its extra: pip install 'kvferry[top]'")
    _ask(runtime_dir, GetStatus())  # nothing to watch: say so in one line
    from kvferry_daemon.top.app import Top
    from kvferry_proto.runtime_dir import default_runtime_dir

    Top(runtime_dir or default_runtime_dir()).run()


ALL: tuple[click.Command, ...] = (status, transfers, explain, drain, undrain, abort, logs, top)


def _ask(runtime_dir: Path | None, request: "control.Request") -> Any:
    from kvferry_daemon.operator import ask
    from kvferry_proto.runtime_dir import default_runtime_dir

    try:
        return ask(runtime_dir or default_runtime_dir(), request)
    except FerryError as error:
        stop_by(error)


def _stop_at_unknown(what: str, near: Sequence[str]) -> NoReturn:
    known = f"; near it are {', '.join(near)}" if near else ""
    stop(Exit.UNKNOWN, f"this daemon knows no transfer {what}; it may have forgotten it{known}")


def _made(kind: Callable[..., Any], **fields: object) -> Any:
    from pydantic import ValidationError

    try:
        return kind(**fields)
    except ValidationError as error:
        (name, *_), given = error.errors()[0]["loc"], error.errors()[0]["input"]
        what = f"is no transfer id: {NO_ID}" if name == "transfer_id" else f"is no {name}"
        stop(Exit.USAGE, f"{given!r} {what}")


def _again_and_again(show: Callable[[], object]) -> None:
    try:
        while True:
            click.clear()  # nothing, where there is no terminal
            show()
            time.sleep(WATCH_S)
    except KeyboardInterrupt:  # how a watch ends
        return
