"""What makes a shell complete `kvferry`: verbs, options and their values, and ids of transfers."""

import click

from kvferry_daemon.output import write
from kvferry_proto.errors import FerryError

VARIABLE = "_KVFERRY_COMPLETE"  # click's own name for it


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what a shell has to read: eval "$(kvferry completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell
    write(kind(click.get_current_context().find_root().command, {}, "kvferry", VARIABLE).source())


def known_ids(context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Ids of transfers that the daemon knows and that begin like this."""
    from kvferry_daemon.operator import ask
    from kvferry_proto.control import GetTransfers
    from kvferry_proto.runtime_dir import default_runtime_dir

    try:
        answer = ask(context.params.get("runtime_dir") or default_runtime_dir(), GetTransfers())
    except FerryError:  # in the midst of a line there is no place for words
        return []
    ids = {row.snapshot.transfer_id for row in answer.transfers}
    return sorted(one for one in ids if one.startswith(begun))
