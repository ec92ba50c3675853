"""The command line: the daemon itself, the demo, and what needs no daemon. See ``Exit`` for codes."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvferry_daemon import verbs
from kvferry_daemon.completion import completion
from kvferry_daemon.key_verbs import keys
from kvferry_daemon.output import Exit, as_json, stop, write
from kvferry_daemon.size_verb import size

if TYPE_CHECKING:
    from kvferry_daemon.config import Config


class _Verbs(click.Group):
    """All commands; one that is interrupted has not failed."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run one; click's own answer to Ctrl-C would be 1, which is the demo's."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            stop(Exit.INTERRUPTED, "interrupted")


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvferry", message="kvferry %(version)s")
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


CONFIG_FILE = click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file [default: the one that KVFERRY_CONFIG names]",
)


@main.command()
@CONFIG_FILE
@click.option("--print-config", is_flag=True, help="show the resulting config as JSON and exit")
@_config_options
def serve(config_path: Path | None, print_config: bool, **flags: Any) -> None:
    """Run the daemon in the foreground. SIGTERM drains, then stops; a second one stops at once."""
    import zmq

    config = _loaded(config_path, flags)
    if print_config:
        write(config.model_dump_json(indent=2))
        return
    from kvferry_daemon.http.listen import HttpMissing
    from kvferry_daemon.keys import KeysRefused
    from kvferry_daemon.memory.placement import PlacementRefused
    from kvferry_daemon.runtime_dir import DirectoryTaken
    from kvferry_daemon.serve import run
    from kvferry_daemon.traces import TracesRefused
    from kvferry_daemon.transports.nixl.agent import NixlFailed, NixlMissing
    from kvferry_daemon.transports.tcp.tls import EncryptionFailed

    try:
        sys.exit(run(config))
    except (KeysRefused, PlacementRefused) as error:
        stop(Exit.USAGE, f"config: {error}")
    except (EncryptionFailed, HttpMissing, NixlMissing, TracesRefused) as error:  # needs an extra
        stop(Exit.USAGE, f"config: {error}")
    except (DirectoryTaken, NixlFailed, OSError, zmq.ZMQError) as error:
        stop(Exit.SERVE, f"cannot start: {error}")


@main.command()
@click.option("--json", "json_wanted", is_flag=True, help="one JSON object, and no live view")
@click.option("--payload", type=click.Choice(["kv", "embeddings"]), default="kv", show_default=True)
@click.option("--tokens", type=click.IntRange(1, 1 << 16), default=20480, show_default=True)
@click.option("--handoff", is_flag=True, help="one daemon for both sides: no byte is copied")
@click.option("--block-reuse", is_flag=True, help="pools just one window large")
@click.option("--total-late", is_flag=True, help="tell the payload's length only at its end")
@click.option("--harm", type=click.Choice(["swap-windows", "zero-token"]), hidden=True)
def demo(json_wanted: bool, **choices: Any) -> None:
    """Move a real model's payload from one process to another through two daemons."""
    if choices["handoff"] and choices["block_reuse"]:
        words = "--block-reuse: a handoff moves no byte into blocks of its own; leave one out"
        raise click.UsageError(words)
    if importlib.util.find_spec("transformers") is None:
        stop(Exit.USAGE, "the demo needs its extra: pip install 'kvferry[demo]'")
    from kvferry_daemon.demo.run import run_demo

    def tell(result: dict[str, Any]) -> None:
        write(as_json("demo", result, line=True))

    sys.exit(run_demo(tell=tell if json_wanted else None, **choices))


@main.command()
@click.option("--json", "json_wanted", is_flag=True, help="one JSON object")
def version(json_wanted: bool) -> None:
    """Show version, commit, wire versions, and what this installation is capable of."""
    from kvferry_daemon.about import about

    facts = about()
    if json_wanted:
        write(as_json("version", {**facts}))
        return
    low, high = facts["wire"]
    can = ", ".join(name for name, there in facts["capabilities"].items() if there)
    write(f"kvferry {facts['version']} (wire versions {low} to {high})")
    write(f"commit {facts['commit'] or 'unknown'}; capable of: {can}")


@main.group("config")
def config_group() -> None:
    """Look at what `serve` would run with."""


@config_group.command()
@CONFIG_FILE
@click.option("--json", "json_wanted", is_flag=True, help="one JSON object")
@_config_options
def check(config_path: Path | None, json_wanted: bool, **flags: Any) -> None:
    """Check flags, environment, file, keys and extras as `serve` does, and start nothing.

    Directory, memory, GPU and ports are the doctor's: `kvferry doctor`.
    """
    config = _loaded(config_path, flags)
    from kvferry_daemon.checks import check_here
    from kvferry_daemon.http.listen import HttpMissing
    from kvferry_daemon.keys import KeysRefused
    from kvferry_daemon.memory.placement import PlacementRefused
    from kvferry_daemon.traces import TracesRefused
    from kvferry_daemon.transports.nixl.agent import NixlMissing
    from kvferry_daemon.transports.tcp.tls import EncryptionFailed

    missing = (EncryptionFailed, HttpMissing, NixlMissing, TracesRefused)
    try:
        check_here(config)
    except (KeysRefused, PlacementRefused, *missing) as error:
        stop(Exit.USAGE, f"config: {error}")
    settings = config.model_dump(mode="json")
    write(as_json("config", {"settings": settings}) if json_wanted else "the config is good")


@main.command()
@CONFIG_FILE
@click.option("--json", "json_wanted", is_flag=True, help="one JSON object")
@_config_options
def doctor(config_path: Path | None, json_wanted: bool, **flags: Any) -> None:
    """Check the machine for a daemon with this config: what is wrong, and what to do."""
    from kvferry_daemon.doctor import FAULT, examine, in_words

    findings = examine(_loaded(config_path, flags))
    is_well = all(one.verdict != FAULT for one in findings)
    if json_wanted:
        rows = [one._asdict() for one in findings]
        write(as_json("doctor", {"well": is_well, "findings": rows}))
    else:
        write(in_words(findings))
    sys.exit(0 if is_well else Exit.DOCTOR)


def _loaded(path: Path | None, flags: Mapping[str, Any]) -> "Config":
    from kvferry_daemon.config import ConfigError, load

    try:
        return load({k: v for k, v in flags.items() if v is not None}, path)
    except ConfigError as error:
        stop(Exit.USAGE, f"config: {error}")


for verb in (*verbs.ALL, keys, size, completion):
    main.add_command(verb)
