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
from bench.table import (
    ALL,
    NOTE,
    OURS_GO_BY,
    Refused,
    live_rows,
    markdown,
    missed_by,
    newest,
    put_into,
    refuse_disturbed,
    short,
    texts,
    with_replay,
)

from bench import aims, paged_device, pieces, replayed

TOP = Path(__file__).parent.parent.parent
README = (TOP / "bench" / "README.md").read_text()
pytestmark = pytest.mark.timeout(300)  # the short run, on a machine that others use too
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


def keys_of(tree: Any) -> set[str]:
    """Of all levels."""
    if isinstance(tree, list):
        return {name for below in tree for name in keys_of(below)}
    if not isinstance(tree, dict):
        return set()
    return {*tree, *(name for below in tree.values() for name in keys_of(below))}


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
        assert absent == ("reason" in row), row
        assert (absent or row["aim"] == "timed") == (row["reached"] is None), row


def test_every_key_is_documented(result: Any) -> None:
    words = set(re.findall(r"[A-Za-z0-9_]+", README))
    numbered = re.compile(r"(window|transfers|live)_\d+_")
    ways = "|".join((*pieces.WAYS, *pieces.PEERS))
    of_a_way = re.compile(rf"^({ways})(?=_gb_per_s$)|(?<=_to_)({ways})$")
    for name in keys_of(result):
        general = numbered.sub(r"\1_N_", name)
        assert {general, of_a_way.sub("W", general)} & words, name


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
    begin, end = "<!-- x -->\n", "<!-- /x -->\n"
    text = put_into(f"a\n{begin}old\n{end}b\n", table, "x")
    assert text == f"a\n{begin}{table}{end}b\n"


def test_each_table_goes_into_its_page(result: Any, tmp_path: Path) -> None:
    path = tmp_path / "replay-2026-11-27-x.json"
    path.write_text(json.dumps(replay_of(8, (8,))))
    judged = with_replay(result, path)
    made = {str(page.relative_to(TOP)): text for page, text in texts(result, path).items()}
    assert made.keys() == {"README.md", "docs/performance.md", "bench/pieces.svg", "bench/live.svg"}
    tables = (short(judged), markdown(judged), replayed.markdown(path))
    there = {name: [text.count(table) for table in tables] for name, text in made.items()}
    assert there["README.md"] == [1, 0, 0]
    assert there["docs/performance.md"] == [0, 1, 1]


def test_what_is_committed_is_what_the_newest_result_says() -> None:
    for path, text in texts(json.loads(newest().read_text()), replayed.newest()).items():
        assert path.read_text() == text, f"{path}: python -m bench.table"


def row(value: float | str, aim: str, reached: bool | None) -> dict[str, Any]:
    """A figure as `aims.judge` has it."""
    return {"words": f"w {value} {aim}", "value": value, "aim": aim, "reached": reached}


def test_the_readme_counts_aims_and_names_those_that_were_missed_by_most(result: Any) -> None:
    told = [
        row(2.0, "<= 1", False),
        row(0.1, ">= 1", False),
        row(1, "<= 0", False),
        row(3.0, "< 3", False),
        row(5.0, "<= 1", False),
        row(0, ">= 2", False),
        *(row(1.0, ">= 0.5", True), row("absent", ">= 1", None), row(4.0, "timed", None)),
    ]
    words = short({**result, "aims": told})
    assert "\nAims reached on this machine: 1 of 7; figures that could not be measured" in words
    assert " on it: 1. All of them: " in words
    assert [line for line in words.splitlines() if line.startswith("- ")] == [
        "- w 1 <= 0: 1, aim <= 0",
        "- w 0 >= 2: 0, aim >= 2",
        "- w 0.1 >= 1: 0.1, aim >= 1",
        "- w 5.0 <= 1: 5, aim <= 1",
    ]
    assert missed_by(told[0]) == 2
    reached = short({**result, "aims": told[-3:]})
    assert "\nAims reached on this machine: 1 of 1; " in reached
    assert reached.endswith(f"[docs/performance.md]({ALL}).\n")


def test_the_readme_has_the_ways_that_were_measured(result: Any) -> None:
    parts = json.loads(json.dumps(result["parts"]))
    for size in (one for name, one in parts["pieces"].items() if name.endswith("_KiB")):
        for name in pieces.PEERS:
            size[f"{name}_gb_per_s"] = {"absent": "not installed"}
        size["nixl_read_gb_per_s"] = {"median": 1.5, "min": 1, "max": 2}
    machine = {**result["machine"], "tcp_congestion_control": "bbr"}
    words = short({**result, "parts": parts, "machine": machine})
    names = re.findall(r"^\| ([^|]+?) \|", words, re.MULTILINE)
    assert names == ["raw TCP", "**kvferry tcp**", "**kvferry tcp, checksum**", "NIXL READ, tcp"]
    assert "here bbr, the others by reno" in words
    reno = short({**result, "machine": {**machine, "tcp_congestion_control": OURS_GO_BY}})
    assert OURS_GO_BY not in reno


def test_polls_and_chunks_are_drawn_by_how_many_are_live(result: Any) -> None:
    live = result["parts"]["live"]
    keys = ("poll_to_echo", "chunk_to_alone")
    assert live_rows(result) == {
        f"{count} live": [live[f"live_{count}_{key}"]["median"] for key in keys]
        for count in (10, 100)
    }
    older = {name: one for name, one in live.items() if "chunk" not in name}
    assert live_rows({"parts": {"live": older}})["10 live"][1] is None


def test_the_plot_shows_what_is_absent() -> None:
    drawn = svg({"a < b": [1.0, None]}, ["64 KiB", "1024 KiB"], "GB/s")
    assert drawn.count("<rect") == 5
    assert "absent" in drawn
    assert "a &lt; b" in drawn


def test_a_disturbed_result_is_refused_by_the_table(result: Any) -> None:
    refuse_disturbed({**result, "others_cores": 0.2})
    with pytest.raises(Refused, match=r"0\.21 cores"):
        refuse_disturbed({**result, "others_cores": 0.21})


def test_the_command_refuses_it_but_for_anyway(result: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**result, "others_cores": 1.0}))
    before = {
        name: (TOP / name).read_bytes()
        for name in ("README.md", "docs/performance.md", "bench/pieces.svg")
    }
    command = [sys.executable, "-m", "bench.table", str(path)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--anyway" in done.stderr
    assert {name: (TOP / name).read_bytes() for name in before} == before


def test_whose_congestion_control_was_used_is_noted(result: Any) -> None:
    of = {
        choice: {**result["machine"], "tcp_congestion_control": choice}
        for choice in ("bbr", "reno")
    }
    noted = markdown({**result, "machine": of["bbr"]})
    assert f"| NIXL WRITE, tcp{NOTE} |" in noted
    assert f"to NIXL WRITE over tcp{NOTE} |" in noted
    assert "here bbr" in noted
    assert f"raw TCP{NOTE}" not in noted
    assert NOTE not in markdown({**result, "machine": of["reno"]})


def test_an_absent_part_is_absent_in_every_aim_of_it() -> None:
    judged = aims.judge({"paged": {"absent": "no CUDA device"}, "gpu": {"absent": "none here"}})
    assert [one["name"] for one in judged] == [
        *("gather_to_copy", "scatter_to_copy"),
        *("gpu_handoff_us", "gpu_handoff_bytes_copied", "gpu_open_ms"),
    ]
    assert {one["value"] for one in judged} == {"absent"}


def test_a_figure_without_a_bound_is_neither_reached_nor_missed() -> None:
    rows = aims.judge({"gpu": {"open_ms": {"median": 3.5}}})
    assert [(one["value"], one["aim"], one["reached"]) for one in rows] == [(3.5, "timed", None)]


ORPHAN = """
import os, subprocess, sys, time
from bench import machine
machine.adopt()
begun_s = machine.ours_s()
burn = "import time\\nwhile time.process_time() < 0.5: pass"
told, theirs = os.pipe()
subprocess.run(["sh", "-c", f"'{sys.executable}' -c '{burn}' &"], pass_fds=[theirs], check=True)
os.close(theirs)
os.read(told, 1)  # its end: both have left
print(machine.ours_s() - begun_s)
"""


def test_a_process_whose_parent_has_left_is_still_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 0.45, "of 0.5 s, in ticks"


def replay_of(times: int | None, tried: tuple[int, ...]) -> dict[str, Any]:
    """As `bench.replay` writes it, see its docstring."""
    runs = [("consume", 1000), *(("whole", 1000 * one) for one in tried)]
    end = {"pool_tokens": 1, "peak_tokens": 900, "mean_tokens": 1, "cpu_ms_a_request": 1.25}
    return {
        "machine": {"cores": 2, "system": "x", "load_before": 0.5},
        "model": {"speed": 10.0},
        "trace": {
            "requests": 12031, "input_tokens": 9, "skipped_tokens": 4, "moved_tokens": 5,
            "largest_tokens": 3000, "planned_seconds": 1.0,
        },
        "runs": [
            {
                "mode": mode, "sink_tokens": tokens, "lag_ms": {"p50": 1.0, "p99": 9.5, "max": 10.0},
                "stall_s": {"waiting_for_blocks": 7.5}, "source": end, "sink": end,
            }
            for mode, tokens in runs
        ],
        "same_p99": {
            "consume_tokens": 1000, "whole_tokens": times and 1000 * times, "times": times,
        },
        "violations": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("times", "tried", "value", "reached", "words"),
    [
        (8, (1, 2, 4, 8), 0.125, True, "need 8 times the sink's memory"),
        (2, (1, 2), 0.5, False, "need 2 times the sink's memory"),
        (None, (1, 64), 0.0156, True, "need more than 64.1 times the sink's memory"),
        (4, (4,), 0.3333, False, "need room for the largest one, 3 times the windows' memory"),
    ],
)
def test_a_committed_replay_is_judged_and_shown(
    tmp_path: Path,
    result: Any,
    times: int | None,
    tried: tuple[int, ...],
    value: float,
    reached: bool,
    words: str,
) -> None:
    path = tmp_path / "replay-2026-11-27-2-cores.json"
    path.write_text(json.dumps(replay_of(times, tried)))
    (tmp_path / "replay-2026-11-26-2-cores.json").write_text("{}")
    assert replayed.newest(tmp_path) == path
    (row,) = [one for one in with_replay(result, path)["aims"] if one["name"] == "sink_memory"]
    assert (row["value"], row["reached"]) == (value, reached)
    table = replayed.markdown(path)
    assert words in table
    assert "| windows | 1,000 | 0.122 | 1.0 | 9.5 | 7.5 | 900 | 1.25, 1.25 |" in table
    assert table.count("| whole payloads | ") == len(tried)
    documented = set(re.findall(r"[A-Za-z0-9_]+", README))
    assert keys_of(replayed.part(path)) <= documented


def test_without_a_replay_or_with_violations_the_aim_is_absent(tmp_path: Path) -> None:
    assert replayed.newest(tmp_path) is None
    assert replayed.part(None) == {"absent": "no replay was committed"}
    path = tmp_path / "replay-2026-11-27-x.json"
    path.write_text(json.dumps({**replay_of(8, (8,)), "violations": ["one"]}))
    assert "violations" in replayed.part(path)["absent"]


def test_the_newest_result_is_a_whole_one(tmp_path: Path) -> None:
    for name, told in (
        ("old", {"date": "2026-11-26", "parts": {"pieces": {}}}),
        ("part", {"date": "2026-11-28", "parts": {"paged": {}}}),
        ("replay-2026-11-29-x", {"runs": []}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    assert newest(tmp_path).name == "old.json"
