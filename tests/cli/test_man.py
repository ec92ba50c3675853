"""Man pages and shell completion, made of the command itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli.processes import kvferry
from kvferry_client import connect
from kvferry_daemon.cli import main
from kvferry_daemon.output import Exit
from live import LAYOUT, LiveDaemon

TOP = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def verbs(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    """Every page that there should be, and what it is of."""
    found = [(name, command)]
    for verb, one in getattr(command, "commands", {}).items():
        found += verbs(one, f"{name}-{verb}")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("man") / "pages"
    subprocess.run([sys.executable, str(TOP / "docs" / "man.py"), str(where)], check=True)
    return where


def test_every_verb_has_a_page_with_its_options_and_all_exit_codes(pages: Path) -> None:
    wanted = verbs(main, "kvferry")
    assert {one.stem for one in pages.glob("*.1")} == {name for name, _ in wanted}
    for name, command in wanted:
        text = (pages / f"{name}.1").read_text()
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[0].replace("-", r"\-") in text, (name, option.opts)
        for code in Exit:
            assert rf"\fB{code.value} {code.name}\fP" in text, (name, code)
        assert "..." not in text.partition(".SH SYNOPSIS")[0], "its name is told in full"


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
def test_groff_has_nothing_to_say_against_them(pages: Path) -> None:
    for page in pages.glob("*.1"):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-P-cbou", "-ww", str(page)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == "", page.name
        assert "EXIT STATUS" in done.stdout


def completed(directory: Path, *words: str) -> list[str]:
    """What a real bash offers for the last of these words."""
    script = (
        'eval "$(kvferry completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_kvferry_completion kvferry; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "KVFERRY_RUNTIME_DIR": str(directory),
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_verbs_values_and_ids(tmp_path: Path) -> None:
    assert completed(tmp_path, "kvferry", "und") == ["undrain"]
    stalls = completed(tmp_path, "kvferry", "transfers", "--stall", "waiting_for_s")
    assert stalls == ["waiting_for_source"]
    assert completed(tmp_path / "no", "kvferry", "explain", "req") == [], "and no word of a fault"
    with (
        LiveDaemon(tmp_path / "a") as daemon,
        connect(daemon.directory, LAYOUT, "tester") as client,
    ):
        for name in ("req-2", "req-1", "other"):
            client.send(name)
        assert completed(daemon.directory, "kvferry", "explain", "req") == ["req-1", "req-2"]
        assert completed(daemon.directory, "kvferry", "abort", "o") == ["other"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    done = kvferry("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_KVFERRY_COMPLETE={shell}_complete" in done.stdout
