"""The command line. Exit codes: 0 well, 1 the demo failed, 2 wrong usage or config, 3 the daemon

could not start or did not drain, 4 no daemon answers, 5 no such transfer, 6 the answer could not
be written, 7 the daemon's ledger could not.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from kvferry_proto.errors import FerryError

EXIT_CONFIG, EXIT_SERVE, EXIT_NO_DAEMON, EXIT_UNKNOWN, EXIT_OUTPUT = 2, 3, 4, 5, 6


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """kvferry moves KV cache and embeddings between inference nodes, window by window."""


def _config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for every field of the config."""
    from kvferry_daemon.config import Config, Deadlines

    names = sorted(Config.model_fields, key=lambda name: name in Deadlines.model_fields)
    for name in reversed(names):
        field = Config.model_fields[name]
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            flag += "/--no-" + name.replace("_", "-")
        about = field.description or "seconds"
        if field.default is not None and field.default_factory is None:
            about += f" [default: {field.default}]"
        command = click.option(flag, name, default=None, help=about, type=_flag_type(field))(
            command
        )
    return command


def _flag_type(field: Any) -> Any:
    return bool if field.annotation is bool else str


@main.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file [default: the one that KVFERRY_CONFIG names]",
)
@click.option("--print-config", is_flag=True, help="show the resulting config as JSON and exit")
@_config_options
def serve(config_path: Path | None, print_config: bool, **flags: Any) -> None:
    """Run the daemon in the foreground. SIGTERM drains, then stops; a second one stops at once."""
    import zmq

    from kvferry_daemon.config import ConfigError, load

    try:
        config = load({k: v for k, v in flags.items() if v is not None}, config_path)
    except ConfigError as error:
        _stop(EXIT_CONFIG, f"config: {error}")
    if print_config:
        _write(config.model_dump_json(indent=2))
        return
    from kvferry_daemon.daemon import run
    from kvferry_daemon.memory.placement import PlacementRefused
    from kvferry_daemon.runtime_dir import DirectoryTaken
    from kvferry_daemon.transports.nixl.agent import NixlFailed

    try:
        sys.exit(run(config))
    except PlacementRefused as error:
        _stop(EXIT_CONFIG, f"config: {error}")
    except (DirectoryTaken, NixlFailed, OSError, zmq.ZMQError) as error:
        _stop(EXIT_SERVE, f"cannot start: {error}")


def _runtime_dir_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--runtime-dir",
        type=click.Path(path_type=Path),
        envvar="KVFERRY_RUNTIME_DIR",
        help="the daemon's runtime directory",
    )(command)


@main.command()
@_runtime_dir_option
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def status(runtime_dir: Path | None, as_json: bool) -> None:
    """Show the daemon: pools, peers, workers, transfers by state."""
    from kvferry_daemon.operator import ask, status_for_people
    from kvferry_proto.control import GetStatus

    answer = _asked(lambda: ask(_directory(runtime_dir), GetStatus()))
    _write(answer.model_dump_json(indent=2) if as_json else status_for_people(answer))


@main.command()
@_runtime_dir_option
@click.argument("transfer_id", required=False)
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def transfers(runtime_dir: Path | None, transfer_id: str | None, as_json: bool) -> None:
    """Show transfers, or every attempt of one."""
    from pydantic import ValidationError

    from kvferry_daemon.operator import ask, transfers_for_people
    from kvferry_proto.control import GetTransfers

    try:
        question = GetTransfers(transfer_id=transfer_id)
    except ValidationError:
        words = "1 to 128 printable ASCII characters without a space"
        _stop(EXIT_CONFIG, f"{transfer_id!r} is no transfer id: {words}")
    answer = _asked(lambda: ask(_directory(runtime_dir), question))
    unknown = transfer_id is not None and not answer.transfers
    if as_json:
        _write(answer.model_dump_json(indent=2))
    elif not unknown:
        _write(transfers_for_people(answer))
    if unknown:
        _stop(
            EXIT_UNKNOWN, f"this daemon knows no transfer {transfer_id}; it may have forgotten it"
        )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the live view")
@click.option("--payload", type=click.Choice(["kv", "embeddings"]), default="kv", show_default=True)
@click.option("--tokens", type=click.IntRange(1, 1 << 16), default=20480, show_default=True)
@click.option("--handoff", is_flag=True, help="one daemon for both sides: no byte is copied")
@click.option("--block-reuse", is_flag=True, help="pools just one window large")
@click.option("--total-late", is_flag=True, help="tell the payload's length only at its end")
@click.option("--harm", type=click.Choice(["swap-windows", "zero-token"]), hidden=True)
def demo(**choices: Any) -> None:
    """Move a real model's payload from one process to another through two daemons."""
    if choices["handoff"] and choices["block_reuse"]:
        words = "--block-reuse: a handoff moves no byte into blocks of its own; leave one out"
        raise click.UsageError(words)
    if importlib.util.find_spec("transformers") is None:
        _stop(EXIT_CONFIG, "the demo needs its extra: pip install 'kvferry[demo]'")
    from kvferry_daemon.demo.run import run_demo

    sys.exit(run_demo(**choices))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def version(as_json: bool) -> None:
    """Show the version and the wire versions."""
    from kvferry_daemon.core.report import our_version
    from kvferry_proto.versions import OURS

    if as_json:
        _write(json.dumps({"version": our_version(), "wire": [OURS.low, OURS.high]}))
    else:
        _write(f"kvferry {our_version()} (wire versions {OURS.low} to {OURS.high})")


def _directory(given: Path | None) -> Path:
    from kvferry_proto.runtime_dir import default_runtime_dir

    return given or default_runtime_dir()


def _asked(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except FerryError as error:
        _stop(EXIT_NO_DAEMON, str(error))


def _write(text: str) -> None:
    try:
        click.echo(text.removesuffix("\n"))
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at exit, and complain in words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has read enough: nothing to tell
            sys.exit(EXIT_OUTPUT)
        _stop(EXIT_OUTPUT, f"cannot write the answer: {error.strerror}")


def _stop(code: int, message: str) -> NoReturn:
    click.echo(f"kvferry: {message}", err=True)
    sys.exit(code)
