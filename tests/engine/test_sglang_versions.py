"""Which SGLang works: what the code says, what the docs say, and what happens with others."""

import re
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest

from kvferry_client import FerryError
from kvferry_client.sglang_versions import VERSIONS, check_version

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_table_names_the_versions_that_are_let_in() -> None:
    rows = re.findall(r"^\| SGLang \| ([0-9.]+) \|", DOCS.read_text(), re.MULTILINE)
    assert tuple(rows) == VERSIONS


@pytest.mark.parametrize("found", ["0.5.23", "0.5.23+cpu", "0.5.23.post1"])
def test_tested_versions_are_let_in(found: str) -> None:
    check_version(found, is_allowed=False)


@pytest.mark.parametrize("found", ["0.5.22", "0.5.24", "0.5.230", "1.5.23", "0.6"])
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
