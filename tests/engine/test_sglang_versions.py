"""Which SGLang works: what the code says, what the docs say, and what happens with others."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry_client import FerryError
from kvferry_client.sglang_supported import (
    ALLOW,
    HOST_RECEIVE,
    UNTRIED,
    check_arguments,
    check_parallelism,
    check_state,
)
from kvferry_client.sglang_versions import VERSIONS, check_version
from sglang_live.engines import ENVIRONMENT

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"
ARGUMENTS = """
import inspect
from sglang.srt.server_args import ServerArgs
print(*inspect.signature(ServerArgs).parameters)
"""


def test_the_table_names_the_versions_that_are_let_in() -> None:
    rows = re.findall(r"^\| SGLang \| ([0-9.]+) \|", DOCS.read_text(), re.MULTILINE)
    assert tuple(rows) == VERSIONS


@pytest.mark.parametrize("found", ["0.5.23", "0.5.23+cpu"])
def test_tested_versions_are_let_in(found: str) -> None:
    check_version(found, is_allowed=False)


@pytest.mark.parametrize(
    "found", ["0.5.22", "0.5.23.post1", "0.5.23rc1", "0.5.24", "0.5.230", "1.5.23", "0.6"]
)
def test_others_are_refused_by_name_unless_they_are_asked_for(found: str) -> None:
    words = rf"engine_unsupported: .* tested with SGLang 0\.5\.23, not {re.escape(found)}"
    with pytest.raises(FerryError, match=words):
        check_version(found, is_allowed=False)
    check_version(found, is_allowed=True)


def test_the_installed_one_is_in_the_table_and_finds_the_plugin() -> None:
    try:
        found = version("sglang")
    except PackageNotFoundError:
        pytest.skip("SGLang is not installed: make test-sglang")
    check_version(found, is_allowed=False)
    (ours,) = (one for one in entry_points(group="sglang.srt.plugins") if one.name == "kvferry")
    assert callable(ours.load())


def test_what_is_refused_are_arguments_of_the_installed_one() -> None:
    """One that is called otherwise there would not be looked at, or end every engine."""
    try:
        version("sglang")
    except PackageNotFoundError:
        pytest.skip("SGLang is not installed: make test-sglang")
    command = [sys.executable, "-c", ARGUMENTS]
    said = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    ).stdout
    assert {*UNTRIED, HOST_RECEIVE} <= set(said.splitlines()[-1].split())


@pytest.mark.parametrize("name", UNTRIED)
def test_arguments_that_nobody_tried_are_refused_unless_they_are_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOW, raising=False)
    arguments = dict.fromkeys(UNTRIED) | {HOST_RECEIVE: 1.0}
    check_arguments(SimpleNamespace(**arguments))
    asked = SimpleNamespace(**arguments | {name: True})
    with pytest.raises(ValueError, match=rf"not tried with .*\(--{name.replace('_', '-')}\)"):
        check_arguments(asked)
    monkeypatch.setenv(ALLOW, "1")
    check_arguments(asked)


def test_what_cannot_be_done_is_refused_whatever_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ALLOW, "1")
    with pytest.raises(ValueError, match="fetches into the device's pool only"):
        check_arguments(SimpleNamespace(**dict.fromkeys(UNTRIED) | {HOST_RECEIVE: 0.5}))
    check_state(["swa"])
    with pytest.raises(ValueError, match="does not carry mamba state"):
        check_state(["swa", "mamba"])
    check_parallelism({"pipeline": 1, "data": 1})
    with pytest.raises(ValueError, match="does not support data parallelism above 1"):
        check_parallelism({"pipeline": 1, "data": 2})
