"""The chart's tests are all that a machine goes without when helm is not to be had."""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

GET_HELM = Path(__file__).parent / "get_helm.py"
RUNS = b"#!/bin/sh\ntest $1 = version\n"
PIP = """
import pathlib, shutil, sys
shutil.copy(pathlib.Path(__file__).with_name("a.whl"), sys.argv[sys.argv.index("--dest") + 1])
"""


def zipped(name: str, data: bytes) -> bytes:
    """An archive of one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def wheel(program: bytes) -> bytes:
    """The package with a program of ours for helm."""
    layer = zipped("helm/helm", program)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer)
        archive.addfile(entry, io.BytesIO(layer))
    return zipped("x/y.jsii.tgz", file.getvalue())


@pytest.mark.parametrize(
    ("package", "left", "words"),
    [
        (wheel(RUNS), ["helm"], ""),
        (wheel(b"\x7fELF of another machine"), [], "Exec format error"),
        (wheel(b"#!/bin/sh\nexit 1\n"), [], "exit status 1"),
        (b"no wheel", [], "not a zip file"),
        (None, [], "exit status 1"),
    ],
    ids=["there", "another machine's", "broken", "another file", "not to be had"],
)
def test_what_has_no_helm_for_this_machine_leaves_nothing_and_fails_nothing(
    tmp_path: Path, package: bytes | None, left: list[str], words: str
) -> None:
    pip, programs = tmp_path / "pip", tmp_path / "bin"
    pip.mkdir()
    programs.mkdir()
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(PIP)
    if package is not None:
        (pip / "a.whl").write_bytes(package)
    done = subprocess.run(
        [sys.executable, str(GET_HELM), str(programs / "helm")],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert [one.name for one in programs.iterdir()] == left
    assert ("tests are skipped" in done.stdout) == (not left)
    assert words in done.stdout
