"""docs/operations.md says what the command line has: every verb, exit code and --json answer."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import kvferry_proto
from cli.processes import kvferry
from kvferry_client import connect
from kvferry_daemon.cli import main
from kvferry_daemon.output import Exit
from live import LAYOUT, WAIT_S, LiveDaemon

PAGE = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text()
WIRE = (Path(kvferry_proto.__file__).parent / "WIRE.md").read_text()
MODEL = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
JSON_VERBS = {  # and how each is asked; the demo has a test of its own
    "status": "status",
    "transfers": "transfers",
    "explain": "explain t",
    "drain": "drain --wait-s 0",
    "undrain": "undrain",
    "abort": "abort t",
    "logs level": "logs level",
    "config check": "config check",
    "doctor": "doctor",
    "keys show": "keys show --keys-dir {home}/keys",
    "size": "size --model {home}/config.json",
    "version": "version",
}
WITHOUT_DAEMON = ("keys show", "size", "version")  # and without its directory


def test_every_exit_code_is_documented() -> None:
    told = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", PAGE, re.MULTILINE)
    assert [(int(code), name) for code, name in told] == [(one.value, one.name) for one in Exit]


def test_every_verb_is_documented_and_has_help() -> None:
    told = {words.split()[0] for words in re.findall(r"^\| `([a-z][^`]*)` \|", PAGE, re.MULTILINE)}
    assert set(main.commands) <= told
    assert all(one.help for one in main.commands.values())


def documented() -> dict[str, set[str]]:
    """The fields of each schema, as the table has them."""
    rows = re.findall(r"^\| `(kvferry/\w+/\d+)` \| (.*?) \|", PAGE, re.MULTILINE)
    return {schema: {"schema", *_fields(cell)} for schema, cell in rows}


def _fields(cell: str) -> Iterator[str]:
    """Those that it names, and those of a message where it says so."""
    message = re.match(r"those of `(\w+)`", cell)
    if message is not None:
        cell = cell[message.end() :]
        _, _, section = WIRE.partition(f"\n### `{message[1]}`\n")
        yield from ("kind", "call")
        yield from re.findall(r"^\| `(\w+)` \|", section.partition("\n### ")[0], re.MULTILINE)
    yield from re.findall(r"`(\w+)`", cell)


def _verbs_with_json(group: click.Group, before: str = "") -> Iterator[str]:
    for name, one in group.commands.items():
        if isinstance(one, click.Group):
            yield from _verbs_with_json(one, f"{before}{name} ")
        elif any("--json" in param.opts for param in one.params):
            yield before + name


def test_every_verb_with_json_is_looked_at_here() -> None:
    assert {*JSON_VERBS, "demo"} == set(_verbs_with_json(main))


def test_every_json_answer_has_the_schema_and_the_fields_that_are_documented(
    tmp_path: Path,
) -> None:
    assert kvferry("keys", "new", "--keys-dir", tmp_path / "keys").returncode == 0
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    seen = {}
    with LiveDaemon(tmp_path / "a") as daemon, connect(daemon.directory, LAYOUT, "one") as one:
        one.send("t")
        for verb, words in JSON_VERBS.items():
            where = [] if verb in WITHOUT_DAEMON else ["--runtime-dir", daemon.directory]
            done = kvferry(*words.format(home=tmp_path).split(), "--json", *where)
            answer = json.loads(done.stdout)
            if verb == "undrain":  # it is what drain says, without what is left
                assert answer.items() >= {"schema": "kvferry/drain/1", "draining": False}.items()
            else:
                seen[answer["schema"]] = set(answer)
    table = documented()
    assert "kvferry/demo/1" in table
    assert seen == {schema: table[schema] for schema in table if schema != "kvferry/demo/1"}


def test_an_interrupted_verb_ends_as_a_shell_expects(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon, connect(daemon.directory, LAYOUT, "one") as one:
        one.send("t")
        with subprocess.Popen(
            [sys.executable, "-m", "kvferry_daemon", "drain", "--runtime-dir", daemon.directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as asking:
            daemon.wait_for_log("set_draining")
            asking.send_signal(signal.SIGINT)
            out, said = asking.communicate(timeout=WAIT_S)
    assert (asking.returncode, out, said) == (130, "", "kvferry: interrupted\n")
