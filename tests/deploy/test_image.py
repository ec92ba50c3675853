"""`make image`: what it asks of whichever builder there is. The builder is a script that writes it down."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from deploy.test_manifests import DEPLOY, TOP

VERSION = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"]
BUILDERS = ("docker", "podman", "buildah")
TOOLS = ("make", "sh", "sed", "git")
BUILDER = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$BUILDAH_FORMAT" "$PWD" "$@" > "${0%/*}/../asked"
exit CODE
"""


class Builders:
    """A PATH with some of them, the tools that `make image` takes, and nothing else."""

    def __init__(self, home: Path, names: tuple[str, ...], code: int = 0) -> None:
        self.bin = home / "bin"
        self.asked = home / "asked"
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):  # there may be no git
                (self.bin / tool).symlink_to(found)
        for name in names:
            (self.bin / name).write_text(BUILDER.replace("CODE", str(code)))
            (self.bin / name).chmod(0o755)

    def run(self, *command: str, top: Path = TOP) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=top,
            env={"PATH": str(self.bin)},  # and no flags of a make around this one
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def image(self, *settings: str, top: Path = TOP) -> tuple[str, list[str]]:
        """Make it; who was asked, and for what."""
        done = self.run("make", "image", *settings, top=top)
        assert done.returncode == 0, done
        name, form, directory, *words = self.asked.read_text().splitlines()
        assert form == "docker"  # podman and buildah would leave the HEALTHCHECK out
        assert Path(directory) / words[-1] == top, "the context"
        return name, words[:-1]

    def commit(self) -> list[str]:
        """How the commit is told, if it is known here: an sdist has none."""
        if not (TOP / ".git").exists() or shutil.which("git") is None:
            return []
        told = self.run("git", "rev-parse", "HEAD").stdout.strip()
        return ["--build-arg", f"COMMIT={told}"] if told else []


@pytest.mark.parametrize("there", [BUILDERS, BUILDERS[1:], BUILDERS[2:]], ids=lambda one: one[0])
def test_the_first_builder_that_is_there_makes_it(tmp_path: Path, there: tuple[str, ...]) -> None:
    builders = Builders(tmp_path, there)
    words = ["build", "--tag", f"kvferry:{VERSION}", *builders.commit()]
    assert builders.image() == (there[0], words)


def test_another_one_can_be_named(tmp_path: Path) -> None:
    assert Builders(tmp_path, BUILDERS).image("BUILDER=podman")[0] == "podman"


def test_what_is_set_goes_on_to_the_dockerfile(tmp_path: Path) -> None:
    builders = Builders(tmp_path, BUILDERS)
    settings = ("BASE=localhost/python:3.11", "EXTRAS=otel,top", "TORCH=torch numpy")
    index = "https://example.org/?a=1&b=2"
    _, words = builders.image(
        "IMAGE=other", *settings, f"TORCH_INDEX={index}", "ARGS=--no-cache --network=host"
    )
    assert words == [
        *("build", "--tag", f"other:{VERSION}", *builders.commit()),
        *("--build-arg", "PYTHON=localhost/python:3.11", "--build-arg", "EXTRAS=otel,top"),
        *("--build-arg", "TORCH=torch numpy", "--build-arg", f"PIP_EXTRA_INDEX_URL={index}"),
        *("--no-cache", "--network=host"),
    ]
    dockerfile = (TOP / "Dockerfile").read_text()
    assert set(re.findall(r"build_arg,(\w+)", (TOP / "Makefile").read_text())) == set(
        re.findall(r"^ARG (\w+)=", dockerfile, re.MULTILINE)
    )


def test_the_version_is_the_projects_and_without_git_there_is_no_commit(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    shutil.copy(TOP / "Makefile", top)
    project = (TOP / "pyproject.toml").read_text()
    (top / "pyproject.toml").write_text(project.replace(f'"{VERSION}"', '"7.8.9rc1"'))
    assert Builders(tmp_path, BUILDERS).image(top=top)[1] == ["build", "--tag", "kvferry:7.8.9rc1"]


def test_without_a_builder_one_line_says_so(tmp_path: Path) -> None:
    done = Builders(tmp_path, ()).run("make", "image")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "none of docker, podman and buildah is installed" in line


def test_a_build_that_fails_fails_the_target(tmp_path: Path) -> None:
    assert Builders(tmp_path, BUILDERS, code=3).run("make", "image").returncode == 2


def test_the_guides_commands_are_taken(tmp_path: Path) -> None:
    """Each line of deploy/README.md, as a shell splits it."""
    builders = Builders(tmp_path, BUILDERS)
    guide = (DEPLOY / "README.md").read_text()
    lines = re.findall(r"^    make image\b *([^#\n]*?) *(?:#.*)?$", guide, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        settings = dict(word.split("=", 1) for word in line.split())
        _, words = builders.image(*line.split())
        assert words[2] == f"{settings.pop('IMAGE', 'kvferry')}:{VERSION}"
        assert {f"{name}={value}" for name, value in settings.items()} <= set(words)
