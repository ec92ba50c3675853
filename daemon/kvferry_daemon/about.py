"""What this installation is: its version, its commit, and what it is capable of."""

import importlib.util
import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TypedDict

from kvferry_daemon.core.report import our_version
from kvferry_proto.versions import OURS

COMMIT = Path(__file__).with_name("COMMIT")  # an image's build writes it
GIT_S = 5.0


class About(TypedDict):
    """What `kvferry version` shows."""

    version: str
    commit: str | None
    wire: tuple[int, int]
    capabilities: dict[str, bool]


def about() -> About:
    """Look at what is installed; loads none of it."""
    needs = {"nixl": "nixl", "cuda": "torch", "http": "aiohttp", "paged_kernel": "triton"}
    can = {name: importlib.util.find_spec(module) is not None for name, module in needs.items()}
    return About(
        version=our_version(),
        commit=_commit(),
        wire=(OURS.low, OURS.high),
        capabilities={"tcp": True, "handoff": True, **can},
    )


def _commit() -> str | None:
    """From the image's build, from pip where it installed from git, or from the checkout."""
    if COMMIT.exists():
        return COMMIT.read_text().strip() or None
    try:
        told = distribution("kvferry").read_text("direct_url.json")
    except PackageNotFoundError:
        told = None
    by_pip = json.loads(told).get("vcs_info", {}).get("commit_id") if told else None
    return str(by_pip) if by_pip else _of_checkout()


def _of_checkout() -> str | None:
    top = Path(__file__).resolve().parents[2]
    if not (top / ".git").exists():
        return None
    command = ["git", "-C", str(top), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_S)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that is another user's
        return None
    return done.stdout.strip()
