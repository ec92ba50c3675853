"""The commands about keys: they need no daemon, and a running one sees what they change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvferry_daemon.output import Exit, as_json, stop, write


@click.group()
def keys() -> None:
    """This daemon's key, and the peers that it trusts."""


def _keys_dir_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--keys-dir",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="KVFERRY_KEYS_DIR",
        required=True,
        help="where the keys lie",
    )(command)


@keys.command()
@_keys_dir_option
def new(keys_dir: Path) -> None:
    """Make a key and print its public half, for the peers to trust."""
    from kvferry_daemon.keys import new_key

    write(_with_keys(lambda: new_key(keys_dir)))


@keys.command()
@_keys_dir_option
@click.option("--json", "json_wanted", is_flag=True, help="one JSON object")
def show(keys_dir: Path, json_wanted: bool) -> None:
    """Show the public key, and the name and key of each trusted peer."""
    from kvferry_daemon.keys import own_key, read_trusted

    own = _with_keys(lambda: own_key(keys_dir))
    try:
        trusted = _with_keys(lambda: read_trusted(keys_dir))
    except FileNotFoundError:
        trusted = {}
    if json_wanted:
        named = [{"name": name, "key": key} for key, name in trusted.items()]
        write(as_json("keys", {"key": own, "trusted": named}))
    else:
        write("\n".join([f"own key: {own}", *(f"{name} {key}" for key, name in trusted.items())]))


@keys.command()
@_keys_dir_option
@click.argument("name")
@click.argument("key")
def trust(keys_dir: Path, name: str, key: str) -> None:
    """Trust a peer's public key under a name; a running daemon sees it within a heartbeat."""
    from kvferry_daemon.keys import trust as trust_key

    _with_keys(lambda: trust_key(keys_dir, name, key))


def _with_keys(act: Callable[[], Any]) -> Any:
    from kvferry_daemon.keys import KeysRefused

    try:
        return act()
    except KeysRefused as error:
        stop(Exit.USAGE, str(error))
