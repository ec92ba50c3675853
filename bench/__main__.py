"""`python -m bench`: every measurement in one run. What the keys mean stands in bench/README.md.

The result goes to `bench/results/<date>-<machine>.json` if every part was run, else to stdout
alone. Progress and the aims go to stderr.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import (
    aims,
    board,
    engines,
    gpu,
    handoff,
    live,
    machine,
    messages,
    paged,
    pieces,
    pool,
    replayed,
    short,
    waiting,
    windows,
)

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "pieces": pieces.measure,
    "windows": windows.measure,
    "at_once": windows.measure_at_once,
    "handoff": handoff.measure,
    "reading": handoff.measure_reading,
    "paged": paged.measure,
    "gpu": gpu.measure,
    "messages": messages.measure,
    "board": board.measure,
    "live": live.measure,
    "allocator": pool.measure,
    "start": waiting.measure_start,
    "waiting": waiting.measure,
    "engines": engines.measure,
    "replay": replayed.measure,
}


def say(words: str) -> None:
    """A line for who waits."""
    print(words, file=sys.stderr, flush=True)


def run(parts: dict[str, Callable[[], dict[str, Any]]], name: str) -> dict[str, Any]:
    """Everything, as one result."""
    result: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.about(name),
        "load_before": machine.load(),
    }
    begun_s, others = time.monotonic(), machine.Others()
    measured = {}
    for part, measure in parts.items():
        part_s = time.monotonic()
        measured[part] = measure()
        say(f"{part} {time.monotonic() - part_s:.0f} s")
    result["seconds"] = round(time.monotonic() - begun_s, 1)
    result["load_after"] = machine.load()
    result["others_cores"] = others.cores()
    return {**result, "parts": measured, "aims": aims.judge(measured)}


def show(result: dict[str, Any]) -> None:
    """The aims, a line each."""
    before, after = result["load_before"][0], result["load_after"][0]
    say(f"load average {before} before, {after} after; others took {result['others_cores']} cores")
    words = {True: "reached", False: "NOT REACHED", None: ""}
    for row in result["aims"]:
        value = row["value"] if row["value"] == "absent" else f"{row['value']:g}"
        why = f" ({row['reason']})" if "reason" in row else ""
        say(f"{words[row['reached']]:11}  {value:>9} {row['aim']:>9}  {row['words']}{why}")


def main() -> None:
    """Read the options, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--machine", default=machine.default_name(), help="its name in the result")
    parser.add_argument("--short", action="store_true", help="smallest sizes: no figure means much")
    given = parser.parse_args()
    parts = short.PARTS if given.short else PARTS
    result = run({given.only: parts[given.only]} if given.only else parts, given.machine)
    text = json.dumps(result, indent=1)
    show(result)
    if given.only or given.short:
        print(text)
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['date'][:10]}-{given.machine}.json"
    path.write_text(text + "\n")
    say(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
