"""Skips what needs SGLang where there is none."""

from importlib.metadata import PackageNotFoundError, version

import pytest


@pytest.fixture(scope="session", autouse=True)
def installed() -> str:
    """The version of SGLang."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        pytest.skip("SGLang is not installed: make test-sglang")
