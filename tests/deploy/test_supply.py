"""What the image is made of: every package by its hash, and nothing that needs root or a shell."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parent.parent.parent
DEPLOY = TOP / "deploy"
DOCKERFILE = (TOP / "Dockerfile").read_text()
SHIPPED = ("serve", "http", "tls")  # extras
VULNERABLE = """{"dependencies": [
    {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]},
    {"name": "b", "skip_reason": "none"}
]}"""
SERVED = """
import os, signal, sys, threading
from kvferry_daemon.command import main
assert os.getuid() == 10001
threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
sys.argv[1:] = ["serve", "--payload-encryption=tls", "--runtime-dir", sys.argv[1]]
main()
"""
TIMED_OUT = """ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed
ERROR:pip_audit._cli:Tip: your network may be blocking this service. Try again with `-s osv`
"""
UNAVAILABLE = """Traceback (most recent call last):
requests.exceptions.HTTPError: 503 Server Error: Service Unavailable for url: https://example.org

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
pip_audit._service.interface.ServiceError
"""
CYCLONEDX = TOP / ".venv-supply" / "bin" / "cyclonedx-py"


def pinned(path: Path) -> dict[str, str]:
    """Versions by package."""
    found = re.findall(r"^([A-Za-z0-9_.\-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-build.txt"])
def test_every_package_of_the_image_is_pinned_by_hash(name: str) -> None:
    entries = re.split(r"\n(?=\S)", (DEPLOY / name).read_text().strip())
    for entry in (one for one in entries if not one.startswith("#")):
        assert re.fullmatch(r"\S+==\S+( \\\n {4}--hash=sha256:[0-9a-f]{64})+", entry), entry[:80]


def test_the_image_has_what_was_tested_and_all_that_it_needs() -> None:
    shipped, tested = pinned(DEPLOY / "requirements.txt"), pinned(TOP / "constraints.txt")
    assert shipped.items() <= tested.items()
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(one for extra in SHIPPED for one in extras[extra])]
    assert {canonicalize_name(Requirement(one).name) for one in needed} <= shipped.keys()


def test_the_image_takes_no_package_without_its_hash() -> None:
    """But for what its builder asks for by name."""
    run = DOCKERFILE.replace("\\\n", " ")
    installs = re.findall(r"pip (?:install|wheel)[^&;\n]*", run)
    assert len(installs) == 5
    asked_for = [one for one in installs if "EXTRAS" in one]
    offline = [one for one in installs if "--no-deps" in one]
    hashed = [one for one in installs if "--require-hashes" in one]
    assert (len(asked_for), len(offline), len(hashed)) == (1, 2, 2)
    assert "--no-build-isolation" in offline[0]  # else it would fetch what builds it


def test_the_image_runs_without_root_and_without_a_shell() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001"]  # a number, for runAsNonRoot
    for word in ("ENTRYPOINT", "CMD"):
        (line,) = re.findall(rf"^{word} (.*)$", last, re.MULTILINE)
        assert isinstance(json.loads(line), list)
    (check,) = re.findall(r"^HEALTHCHECK .*?CMD (.*)$", last, re.MULTILINE)
    assert isinstance(json.loads(check), list)


def test_a_daemon_runs_as_nobody_on_a_file_system_that_it_cannot_write_to(tmp_path: Path) -> None:
    """The runtime directory is all that it needs: a tmpfs, as in the manifests."""
    with TemporaryDirectory(dir="/dev/shm") as runtime:
        alone = (
            f"mount -t tmpfs -o mode=1777 run {runtime} && mount -o remount,bind,ro / && "
            f"! touch {tmp_path}/x 2> /dev/null && cd / && exec setpriv --reuid 10001 "
            f'--clear-groups --no-new-privs "$0" -c "$1" {runtime}/daemon'
        )
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", alone, sys.executable, SERVED],
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if "unshare" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["pid"]


@pytest.mark.parametrize(
    ("prints", "says", "code", "words"),
    [
        (VULNERABLE, "", 1, "a 1 has CVE-1; fixed in: 2"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', "", 0, "nothing known"),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', "", 0, "skipped, nothing"),
        ("", "requests.exceptions.ConnectionError: no route", 0, "skipped, nobody can be asked"),
        ("", TIMED_OUT, 0, "nobody can be asked: ERROR:pip_audit._cli:Could not connect to PyPI"),
        ("", UNAVAILABLE, 0, "nobody can be asked: requests.exceptions.HTTPError: 503"),
        ("", "ERROR:pip_audit._cli:PyPI is not redirecting properly", 0, "nobody can be asked"),
        ("", "ERROR: it is no requirements file", 2, "pip-audit failed"),
        ("", "", 2, "pip-audit failed"),
    ],
)  # fmt: skip
def test_an_audit_that_could_not_be_made_is_told_from_one_that_found_something(
    tmp_path: Path, prints: str, says: str, code: int, words: str
) -> None:
    """With a pip-audit that says what the real one has been seen to say."""
    package = tmp_path / "pip_audit"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        f"import sys\nprint({prints!r})\nprint({says!r}, file=sys.stderr)\nsys.exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "audit.py"), str(DEPLOY / "requirements.txt")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, words in done.stdout + done.stderr) == (code, True), done


@pytest.mark.skipif(not CYCLONEDX.exists(), reason="not installed: make sbom")
def test_the_bill_of_materials_names_every_package_and_its_hash(tmp_path: Path) -> None:
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "sbom"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    )
    command = made.stdout.replace("\\\n", " ").replace(
        "build/sbom.json", str(tmp_path / "sbom.json")
    )
    subprocess.run(command, cwd=TOP, shell=True, check=True, capture_output=True)
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    parts = {canonicalize_name(one["name"]): one for one in bill["components"]}
    assert {name: one["version"] for name, one in parts.items()} == pinned(
        DEPLOY / "requirements.txt"
    )
    assert "sha" in json.dumps(bill["components"]).lower()
