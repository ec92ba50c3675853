"""Tests that need a GPU are skipped where there is none, and the end of a run is its last word."""

import atexit
import os
import sys
from importlib.util import find_spec

import pytest

if find_spec("hypothesis") is not None:  # the engines' environments have none
    from hypothesis import HealthCheck, settings

    # How long an example takes says how busy the machine is, and nothing of us.
    settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ours")


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


def pytest_sessionfinish(exitstatus: int) -> None:
    """Leave without the destructors of native libraries, once Python has nothing more to say.

    Those of NIXL's wheel crash where the machine has a libnl of its own, after all tests have passed.
    That our daemons, too, leave without them is tested by their exit status.
    """
    atexit.register(_leave, int(exitstatus))


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    raised = getattr(sys, "last_value", None) is not None  # after the session, by a warning's error
    os._exit(status or raised)
