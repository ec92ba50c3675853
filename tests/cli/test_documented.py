"""docs/operations.md says what the command line has: every verb and every exit code."""

import re
from pathlib import Path

from kvferry_daemon.cli import main
from kvferry_daemon.output import Exit

PAGE = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text()


def test_every_exit_code_is_documented() -> None:
    told = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", PAGE, re.MULTILINE)
    assert [(int(code), name) for code, name in told] == [(one.value, one.name) for one in Exit]


def test_every_verb_is_documented_and_has_help() -> None:
    told = {words.split()[0] for words in re.findall(r"^\| `([a-z][^`]*)` \|", PAGE, re.MULTILINE)}
    assert set(main.commands) <= told
    assert all(one.help for one in main.commands.values())
