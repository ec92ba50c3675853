"""A release as its users get it: built, installed beside nothing of ours, and of one version."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
VERSION: str = PROJECT["version"]
ROOTS = ("client", "daemon", "proto")
MADE = (".git", ".venv*", ".*_cache", "__pycache__", "build", "*.egg-info", "COMMIT", ".hypothesis")
BUILD_S = 110


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, the wheel out of the sdist, of a copy of the tree."""
    home = tmp_path_factory.mktemp("release")
    shutil.copytree(TOP, home / "tree", ignore=shutil.ignore_patterns(*MADE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(home / "dist")]
    run([*command, str(home / "tree")])
    return home / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it. Its dependencies are those of this one.

    They come by a path file, whose own path files are not read: what is installed here as editable
    is not there.
    """
    home = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", str(home)])
    pip = [sys.executable, "-m", "pip", "--python", str(home), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", str(wheel)])
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def run(command: list[str], cwd: Path | None = None) -> str:
    """What a command says; it sees nothing of this tree."""
    ours = {"PYTHONPATH", "VIRTUAL_ENV"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=BUILD_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    there = {
        str(path.relative_to(TOP / root))
        for root in ROOTS
        for path in (TOP / root).rglob("*")
        if path.is_file() and not {"__pycache__", "COMMIT"} & set(path.parts)
    }
    with zipfile.ZipFile(wheel) as files:
        packed = {name for name in files.namelist() if ".dist-info/" not in name}
    assert packed == there
    assert {f"kvferry_{root}/py.typed" for root in ROOTS} <= packed


def test_the_sdist_has_what_it_takes_to_test_it(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "mkdocs.yml"} <= packed
    for folder in ("tests", "docs", "deploy", "bench"):
        there = {
            str(file.relative_to(TOP))
            for file in (TOP / folder).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert there <= packed


def test_what_is_installed_answers_with_its_version(venv: Path, tmp_path: Path) -> None:
    command = str(venv / "bin" / "kvferry")
    assert run([command, "--version"], tmp_path) == f"kvferry {VERSION}\n"
    about = json.loads(run([command, "version", "--json"], tmp_path))
    assert (about["version"], about["commit"]) == (VERSION, None)
    assert json.loads(run([command, "config", "check", "--json"], tmp_path))["settings"]


def test_what_is_installed_is_the_wheels(venv: Path, tmp_path: Path) -> None:
    code = "import kvferry_client, kvferry_daemon, kvferry_proto as p; print(p.__file__)"
    assert run([str(venv / "bin" / "python"), "-c", code], tmp_path).startswith(str(venv))


def test_its_entry_points_lead_to_what_is_there(venv: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, json\nfrom importlib.metadata import distribution\n"
        "d = distribution('kvferry')\n"
        "print(json.dumps([[e.group, e.name, e.value, bool(importlib.util.find_spec(e.module))]"
        " for e in d.entry_points]))"
    )
    found = json.loads(run([str(venv / "bin" / "python"), "-c", code], tmp_path))
    asked = [["console_scripts", *one] for one in PROJECT["scripts"].items()]
    for group, points in PROJECT["entry-points"].items():
        asked += [[group, *one] for one in points.items()]
    assert sorted(found) == sorted([*one, True] for one in asked)


def test_the_changelog_begins_with_this_version() -> None:
    titles = re.findall(r"^## (\S+)", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == VERSION


def test_what_is_deployed_is_of_this_version() -> None:
    images = [
        (str(path.relative_to(TOP)), version)
        for path in sorted((TOP / "deploy").rglob("*.yaml"))
        for version in re.findall(r"\bkvferry[\w\-]*:(\d[\w.\-]*)", path.read_text())
    ]
    assert len({path for path, _ in images}) >= 3
    assert {version for _, version in images} == {VERSION}
