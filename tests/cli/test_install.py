"""The command as it is installed: its door, and what goes into an image."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvferry_daemon.command import EXTRA

TOP = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("missing", EXTRA)
def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path, missing: str) -> None:
    module, _, function = PROJECT["scripts"]["kvferry"].partition(":")
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'kvferry'\n"
        f"from {module} import {function}; {function}()"
    )
    command = [sys.executable, "-c", code]
    where = ["--runtime-dir", str(tmp_path / "d")]
    args = ["serve", *where] if missing in ("uvloop", "xxhash") else ["status", *where]
    done = subprocess.run(
        [*command, *args], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert f"{missing} is not installed" in line
    assert "pip install 'kvferry[daemon]'" in line


@pytest.mark.parametrize(
    ("missing", "extra", "flags"),
    [
        ("aiohttp", "http", ["--http-port=0"]),
        ("opentelemetry", "otel", ["--otlp-endpoint=http://127.0.0.1:9/v1/traces"]),
        ("nixl", "nixl", ["--transport=nixl"]),
        ("cryptography", "tls", ["--payload-encryption=tls"]),
    ],
)
def test_a_daemon_that_needs_an_extra_says_what_to_install(
    tmp_path: Path, missing: str, extra: str, flags: list[str]
) -> None:
    """As for any other wrong config: to start it again would not help."""
    code = (
        "import importlib.metadata, sys; version = importlib.metadata.version\n"
        f"importlib.metadata.version = lambda name: version(name.replace({missing!r}, 'absent'))\n"
        f"sys.modules[{missing!r}] = None\n"
        "from kvferry_daemon.command import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", "--runtime-dir", str(tmp_path / "d"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert f"pip install 'kvferry[{extra}]'" in line


def test_what_the_door_names_is_what_the_extra_adds() -> None:
    extras = PROJECT["optional-dependencies"]
    assert "kvferry[serve]" in extras["daemon"]
    needs = {*extras["serve"], *extras["daemon"]} - {"kvferry[serve]"}
    added = {need.partition(">=")[0] for need in needs}
    assert added == {*EXTRA, "torch"}, "torch is loaded for device pools alone"


def test_no_image_takes_in_what_git_or_tools_made() -> None:
    ignored = (TOP / ".dockerignore").read_text().split()
    assert {".git/", ".venv/", "**/__pycache__/", "**/.*_cache/"} <= set(ignored)
