"""Every page: its links lead somewhere, its commands exist, and it can be built as a site."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
import yaml

from docs.pages import LINK, TOP, anchors, commands, pages
from kvferry_daemon.cli import main
from kvferry_proto.errors import ADVICE, Code
from kvferry_proto.versions import OURS

ERRORS = TOP / "docs" / "errors.md"
WORDS = re.compile(r"### (\w+)\n\nFault: (\w+)\. Remedy: ([^\n]*)\.\n\n(\S[^\n]{15,})\n")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(TOP)))
def test_a_pages_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), link
        assert not parts.fragment or parts.fragment in anchors(target), link


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(TOP)))
def test_a_pages_verbs_and_flags_exist(page: Path) -> None:
    """Of commands in sessions; what they do is tested where the page says what they answer."""
    for command in commands(page):
        program, *words = shlex.split(command, comments=True)
        if program != "kvferry":
            continue
        verb: click.Command = main
        while isinstance(verb, click.Group):
            verb = verb.commands[words.pop(0)]
        flags = {flag for one in verb.params for flag in (*one.opts, *one.secondary_opts)}
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert asked <= flags | {"--help"}, command


def test_the_site_can_be_built_with_nothing_to_warn_of(tmp_path: Path) -> None:
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=TOP, env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text()
    assert "Join the daemon of a runtime directory" in api
    assert all(f'id="kvferry_client.{name}"' in api for name in ("Client.poll", "Sending.fill"))


def test_every_page_of_docs_is_in_the_sites_menu() -> None:
    """Strict building sees that, too; this says it without the tool."""
    text = (TOP / "mkdocs.yml").read_text()
    yaml.safe_load(text)
    there = {str(page.relative_to(TOP / "docs")) for page in pages() if "docs/" in str(page)}
    assert set(re.findall(r"^ +- ([\w./\-]+\.md)$", text, re.MULTILINE)) == there


def test_every_error_code_has_its_fault_its_remedy_and_what_to_do() -> None:
    """Each heading of the third level is one, and none has two."""
    text = ERRORS.read_text()
    told = [(code, fault, remedy) for code, fault, remedy, _ in WORDS.findall(text)]
    expected = [(code, str(ADVICE[code].fault), ADVICE[code].remedy) for code in Code]
    assert sorted(told) == sorted(expected)
    assert len(re.findall("^### ", text, re.MULTILINE)) == len(Code)


def test_the_compatibility_page_is_of_the_wire_that_we_speak() -> None:
    text = (TOP / "docs" / "compatibility.md").read_text()
    assert re.findall(r"versions of its own, and this is (\d+)\.", text) == [str(OURS.high)]
