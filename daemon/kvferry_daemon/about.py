"""What this installation is: its version, its commit, and what it is capable of."""

import ast
import importlib.util
import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TypedDict

from kvferry_daemon import traces
from kvferry_daemon.core.report import our_version
from kvferry_daemon.http import listen
from kvferry_proto.versions import OURS

COMMIT = Path(__file__).with_name("COMMIT")  # an image's build writes it
GIT_S = 5.0
NEEDS = {
    "nixl": ("nixl",),
    "http": listen.NEEDED,
    "paged_kernel": ("triton",),
    "tls": ("cryptography",),
    "otel": traces.NEEDED,
    "top": ("textual",),
}


class About(TypedDict):
    """What `kvferry version` shows."""

    version: str
    commit: str | None
    wire: tuple[int, int]
    capabilities: dict[str, bool]


def about() -> About:
    """Look at what is installed; loads none of it."""
    can = {name: all(map(is_installed, modules)) for name, modules in NEEDS.items()}
    return About(
        version=our_version(),
        commit=_commit(),
        wire=(OURS.low, OURS.high),
        capabilities={"tcp": True, "handoff": True, "cuda": _torch_has_cuda(), **can},
    )


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without doing so."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package around it
        return False


def _torch_has_cuda() -> bool:
    """Whether torch is built for CUDA: its build writes down for which one, or None."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        tree = ast.parse(Path(found.origin).with_name("version.py").read_text())
    except (OSError, ValueError, SyntaxError):
        return False
    told = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return any(_is_a_version_of_cuda(node) for node in told)


def _is_a_version_of_cuda(node: ast.Assign | ast.AnnAssign) -> bool:
    names = node.targets if isinstance(node, ast.Assign) else [node.target]
    is_cuda = any(isinstance(name, ast.Name) and name.id == "cuda" for name in names)
    value = node.value
    return is_cuda and isinstance(value, ast.Constant) and isinstance(value.value, str)


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
