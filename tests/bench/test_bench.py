"""The short form of `make bench`: it works, its keys are those that are documented, bytes are right.

Says nothing of speed.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.__main__ import PARTS
from bench.plot import svg
from bench.table import BEGIN, END, live_rows, markdown, put_into

from bench import aims, paged_device, pieces

TOP = Path(__file__).parent.parent.parent
README = (TOP / "bench" / "README.md").read_text()
MOVING = {"pieces", "windows", "at_once", "handoff", "reading"}


@pytest.fixture(scope="module")
def result() -> Any:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")}
    running = subprocess.Popen(
        [sys.executable, "-m", "bench", "--short", "--machine", "test"],
        cwd=TOP,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = running.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, stderr
    return json.loads(stdout)


def figures(tree: Any) -> list[dict[str, Any]]:
    if not isinstance(tree, dict):
        return []
    if "median" in tree or "absent" in tree:
        return [tree]
    return [figure for below in tree.values() for figure in figures(below)]


def test_every_part_is_there_and_has_moved_the_right_bytes(result: Any) -> None:
    assert result["parts"].keys() == PARTS.keys()
    assert result["machine"]["name"] == "test"
    assert len(result["load_before"]) == len(result["load_after"]) == 3
    for part in MOVING:
        assert result["parts"][part]["bytes_verified"] is True, part
    assert result["parts"]["handoff"]["bytes_copied"] == 0


def test_a_figure_is_a_median_with_its_range_or_a_reason(result: Any) -> None:
    for figure in figures(result["parts"]):
        if "absent" in figure:
            assert figure["absent"]
        else:
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]


def test_every_aim_is_judged(result: Any) -> None:
    assert [row["name"] for row in result["aims"]] == [aim.name for aim in aims.AIMS]
    for row in result["aims"]:
        absent = row["value"] == "absent"
        assert absent == (row["reached"] is None) == ("reason" in row), row


def test_every_key_is_documented(result: Any) -> None:
    words = set(re.findall(r"[A-Za-z0-9_]+", README))
    for name in (*result, *result["machine"], *result["parts"], *result["aims"][0]):
        assert name in words, name
    numbered = re.compile(r"(window|transfers|live)_\d+_")
    for part in result["parts"].values():
        for name in part:
            assert numbered.sub(r"\1_N_", name) in words, name


def test_an_absent_peer_is_told_with_the_reason(tmp_path: Path) -> None:
    size = pieces.measure(1 << 20, (64 << 10,), 1, tmp_path / "python")["64_KiB"]
    for name in pieces.PEERS:
        assert size[f"{name}_gb_per_s"] == {"absent": "not installed: make bench-peers"}
        assert size[f"plain_to_{name}"] == size[f"{name}_gb_per_s"]
    judged = aims.judge({"pieces": {"64_KiB": size}})
    (row,) = [one for one in judged if one["name"] == "stream_to_mooncake"]
    assert (row["value"], row["reached"]) == ("absent", None)


def test_the_paged_part_is_absent_or_moves_the_right_bytes(result: Any) -> None:
    """Its code runs in host memory too, where its figures would say nothing."""
    if not torch.cuda.is_available():
        assert result["parts"]["paged"] == {"absent": "no CUDA device"}
    rows_bytes = (8 << 10, 64 << 10)
    part = paged_device.measure_on(torch.device("cpu"), 1 << 20, rows_bytes, 1, layers=2)
    assert part["bytes_verified"] is True
    assert part["total_bytes"] == 1 << 20
    words = set(re.findall(r"[A-Za-z0-9_]+", README))
    for name in (*part, *part["8_KiB"]):
        assert name in words, name
    assert len(figures(part)) == 2 * 5


def test_wrong_bytes_are_seen(tmp_path: Path) -> None:
    pools = pieces.Pools(tmp_path, 1 << 20)
    with pytest.raises(AssertionError):
        pools.check(64 << 10)


def test_the_table_goes_between_the_markers(result: Any) -> None:
    table = markdown(result)
    assert table.count("\n|") > len(result["aims"]) + len(pieces.WAYS)
    text = put_into(f"a\n{BEGIN}old\n{END}b\n", table)
    assert text == f"a\n{BEGIN}{table}{END}b\n"
    assert put_into((TOP / "README.md").read_text(), table).count(table) == 1


def test_polls_are_drawn_by_how_many_are_live(result: Any) -> None:
    live = result["parts"]["live"]
    rows = {"10 live": ["live_10_poll_to_echo"], "100 live": ["live_100_poll_to_echo"]}
    assert live_rows(result) == {
        name: [live[key]["median"] for key in keys] for name, keys in rows.items()
    }


def test_the_plot_shows_what_is_absent() -> None:
    drawn = svg({"a < b": [1.0, None]}, ["64 KiB", "1024 KiB"], "GB/s")
    assert drawn.count("<rect") == 5
    assert "absent" in drawn
    assert "a &lt; b" in drawn
