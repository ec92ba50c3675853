"""Tests that need a GPU are skipped where there is none."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Look for a GPU only if a test wants one: torch takes a second to load."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device, or a torch without CUDA")
        for item in wanting:
            item.add_marker(skip)
