"""docs/security.md: each line of its tables names tests that there are, and one of them attacks."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from attacks.weak import WEAK
from docs.pages import TOP

PAGE = TOP / "docs" / "security.md"
ATTACKS = TOP / "tests" / "attacks"
NAMED = re.compile(r"`((?:tests/)?[\w/]+\.py)(?:::(\w+))?`")
ALONE = "*alone*: "  # parts of the daemon are tested by themselves
SET = "*set*: "  # the defence is a setting: one run has it, another one has not


class Line(NamedTuple):
    """A row of a table whose last column is `test`."""

    attack: str
    tests: str


def lines() -> Iterator[Line]:
    """Of every table of attacks."""
    for table in re.findall(
        r"^\|.*\| test \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE
    ):
        for row in table.splitlines():
            attack, _, tests = row.strip("| ").split(" | ")
            yield Line(attack, tests)


@cache
def functions(path: Path) -> dict[str, str]:
    """The source of each test of a file, decorators included."""
    text = path.read_text()
    source = text.splitlines()
    return {
        one.name: "\n".join(source[_first(one) - 1 : one.end_lineno])
        for one in ast.parse(text).body
        if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")
    }


def _first(one: ast.FunctionDef) -> int:
    return min([one.lineno, *(decorator.lineno for decorator in one.decorator_list)])


def file_of(name: str) -> Path:
    return TOP / name if "/" in name else ATTACKS / name


def switches_off(source: str) -> bool:
    """Whether a test has a run with a defence of `attacks/weak.py` switched off."""
    return any(f'"{name}"' in source for name in WEAK)


LINES = list(lines())
ALONE_MAX = 3


def test_there_are_all_the_tables() -> None:
    text = PAGE.read_text()
    assert len(LINES) > 45
    assert sum(line.tests.startswith(ALONE) for line in LINES) <= ALONE_MAX
    assert (
        text.count("| test |\n")
        == len(re.findall("^## What (?:stops|libzmq)", text, re.MULTILINE))
        == 4
    )


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.attack[:40])
def test_a_line_names_tests_that_there_are_and_an_attack_that_succeeds(line: Line) -> None:
    """Against a daemon that lacks the defence."""
    named = NAMED.findall(line.tests)
    assert named, line
    if line.tests.startswith(ALONE):
        assert all(file_of(file).exists() for file, _ in named)
        return
    for file, test in named:
        assert test in functions(file_of(file)), f"{file} has no {test}"
    attacks = [functions(file_of(file))[test] for file, test in named if "/" not in file]
    assert line.tests.startswith(SET) or any(map(switches_off, attacks)), line


@pytest.mark.parametrize("name", WEAK)
def test_whatever_can_be_switched_off_is(name: str) -> None:
    sources = [path.read_text() for path in ATTACKS.glob("test_*.py")]
    assert any(f'"{name}"' in source for source in sources)


def test_what_is_said_not_to_be_switched_off_has_its_tests() -> None:
    section = PAGE.read_text().partition("## What is not switched off\n")[2].partition("\n#")[0]
    tests = re.findall(r"`(test_\w+)`", section)
    there = {name for path in ATTACKS.glob("test_*.py") for name in functions(path)}
    assert len(tests) == 2
    assert set(tests) <= there
    assert all(file_of(file).exists() for file, _ in NAMED.findall(section))
