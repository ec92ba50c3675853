"""How a command ends: what it writes, in words or as JSON, and its exit code."""

import json
import os
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, NoReturn

import click

from kvferry_proto.errors import Code, FerryError

if TYPE_CHECKING:
    from pydantic import BaseModel

SCHEMA = 1  # of every --json answer; grows when a field changes its meaning or goes


class Exit(IntEnum):
    """Exit codes of every command; 0 is well."""

    DEMO = 1  # the demo failed
    USAGE = 2  # wrong usage or config, or an extra or terminal that is not there
    SERVE = 3  # the daemon could not start, or did not drain when it was stopped
    NO_DAEMON = 4  # no daemon answers
    UNKNOWN = 5  # no such transfer
    OUTPUT = 6  # the answer could not be written
    LEDGER = 7  # the daemon's ledger could not be written
    UNDRAINED = 8  # `drain`: transfers are still there, or the daemon takes new ones again
    PERMISSION = 9  # the control socket, its directory, or what was asked of it, is not this user's
    VERSION = 10  # the daemon is of another version and does not know the verb
    REFUSED = 11  # the daemon refused, for another reason
    DOCTOR = 12  # `doctor` found what keeps a daemon from running
    INTERRUPTED = 130  # Ctrl-C, as shells have it


EXITS = {
    Code.DAEMON_UNREACHABLE: Exit.NO_DAEMON,
    Code.DIRECTORY_REFUSED: Exit.PERMISSION,
    Code.UNKNOWN_TRANSFER: Exit.UNKNOWN,
    Code.CONTROL_DENIED: Exit.PERMISSION,
    Code.NO_COMMON_VERSION: Exit.VERSION,
}


def write(text: str) -> None:
    """Write an answer; exit with OUTPUT if that cannot be."""
    try:
        click.echo(text.removesuffix("\n"))
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at exit, and complain in words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has read enough: nothing to tell
            sys.exit(Exit.OUTPUT)
        stop(Exit.OUTPUT, f"cannot write the answer: {error.strerror}")


def as_json(verb: str, answer: "BaseModel | dict[str, object]", *, line: bool = False) -> str:
    """An answer as one object that names its schema; ``line``: without a line break."""
    fields = answer if isinstance(answer, dict) else answer.model_dump(mode="json")
    whole = {"schema": f"kvferry/{verb}/{SCHEMA}", **fields}
    return json.dumps(whole, indent=None if line else 2)


def stop(code: Exit, message: str) -> NoReturn:
    """End the command with words on stderr."""
    click.echo(f"kvferry: {message}", err=True)
    sys.exit(code)


def stop_by(error: FerryError) -> NoReturn:
    """End the command with the exit code of this error."""
    stop(EXITS.get(error.code, Exit.REFUSED), str(error))
