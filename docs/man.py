"""Writes kvferry(1) and a page for each verb, made of the command itself: python docs/man.py DIR"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click_man.core import write_man_pages

from kvferry_daemon.cli import main
from kvferry_daemon.core.report import our_version

PAGE = Path(__file__).parent / "operations.md"
ENVIRONMENT = r"""
.SH ENVIRONMENT
.TP
\fBKVFERRY_RUNTIME_DIR\fP
the daemon's runtime directory, for every verb that talks to it
.TP
\fBKVFERRY_CONFIG\fP
a TOML file of settings; KVFERRY_ and the name of a setting in capitals is that setting
"""


def exit_codes() -> Iterator[tuple[str, str]]:
    """Each code, and what it means, from the table in docs/operations.md."""
    section = PAGE.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    for code, name, words in re.findall(r"^\| (\d+) \| (\w*) *\| (.*) \|$", section, re.MULTILINE):
        yield f"{code} {name}".strip(), words.replace("`", "")


def name_in_full(command: click.Command) -> None:
    """Else click cuts what stands beside a name short."""
    command.short_help = (command.help or "").strip().partition("\n")[0].removesuffix(".")
    for one in getattr(command, "commands", {}).values():
        name_in_full(one)


def write_all(directory: Path) -> None:
    """Every page, with exit codes and environment behind what click knows."""
    directory.mkdir(parents=True, exist_ok=True)
    name_in_full(main)
    write_man_pages("kvferry", main, version=our_version(), target_dir=str(directory))
    codes = "".join(f".TP\n\\fB{code}\\fP\n{words}\n" for code, words in exit_codes())
    for page in directory.glob("kvferry*.1"):
        made = page.read_text().replace("'", r"\(aq")
        page.write_text(f"{made}.SH EXIT STATUS\n{codes}{ENVIRONMENT.lstrip()}")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
