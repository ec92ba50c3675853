"""What a replay that was committed says (`bench.replay --out bench/results/replay-DATE-MACHINE.json`).

It takes the better part of an hour, so `make bench` does not run it: it reads the newest one.
"""

import json
import re
from pathlib import Path
from typing import Any

from bench.figures import absent

RESULTS = Path(__file__).parent / "results"
NAME = re.compile(r"replay-(\d{4}-\d\d-\d\d)-(.+)\.json")
KV_TOKEN_KIB = 128  # of Llama-3-8B, for whoever thinks in bytes
WAITED = "waiting_for_blocks"
HEAD = (
    "| sink | its memory, tokens | as KV of Llama-3-8B, GiB | lag p50, ms | lag p99, ms "
    "| waited for blocks, s | peak, tokens | CPU a request, source and sink, ms |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def newest(results: Path = RESULTS) -> Path | None:
    """The replay of the latest date, if there is one."""
    found = [path for path in results.glob("replay-*.json") if NAME.fullmatch(path.name)]
    return max(found, key=lambda path: path.name, default=None)


def part(path: Path | None) -> dict[str, Any]:
    """What the aim is judged by.

    Where no whole size was as good, the largest that was tried stands for it: it takes more. Where the
    first one that holds the largest payload was as good, that payload does: it may take no more.
    """
    if path is None:
        return absent("no replay was committed")
    told = json.loads(path.read_text())
    if told["violations"]:
        return absent(f"{path.name} has violations")
    windows_tokens = told["same_p99"]["consume_tokens"]
    whole_tokens = told["same_p99"]["whole_tokens"]
    tried = [one["sink_tokens"] for one in told["runs"] if one["mode"] == "whole"]
    if not tried:
        return absent(f"{path.name} has no whole payloads")
    largest_tokens = told["trace"]["largest_tokens"]
    whole_needs = whole_tokens or max(tried)
    if whole_tokens == min(tried):
        whole_needs = max(largest_tokens, windows_tokens)
    return {
        "file": path.name,
        "requests": told["trace"]["requests"],
        "windows_tokens": windows_tokens,
        "whole_tokens": whole_tokens,
        "whole_least_tokens": min(tried),
        "whole_tried_tokens": max(tried),
        "largest_tokens": largest_tokens,
        "windows_to_whole": round(windows_tokens / whole_needs, 4),
    }


def measure() -> dict[str, Any]:
    """Of the newest one."""
    return part(newest())


def markdown(path: Path) -> str:
    """The memory that is needed for the same p99, as a table."""
    told = json.loads(path.read_text())
    named = NAME.fullmatch(path.name)
    assert named is not None, path
    trace, machine, model = told["trace"], told["machine"], told["model"]
    played = (
        f"{trace['requests']:,} requests of a public trace, {model['speed']:g} times as fast as they "
        f"came: {trace['moved_tokens']:,} tokens moved, {trace['skipped_tokens']:,} skipped as shared "
        f"prefixes, the largest payload {trace['largest_tokens']:,}; {machine['cores']} cores, "
        f"{named[1]}. Lag is from prefill's end to decode's seeing Success.\n"
    )
    lines = [
        played,
        HEAD + "\n".join(_row(one) for one in told["runs"]),
        "",
        _verdict(part(path)),
    ]
    return "\n".join(lines) + "\n"


def _row(one: dict[str, Any]) -> str:
    kind = "windows" if one["mode"] == "consume" else "whole payloads"
    tokens, lag = one["sink_tokens"], one["lag_ms"]
    cells = (
        kind,
        f"{tokens:,}",
        f"{tokens * KV_TOKEN_KIB / (1 << 20):.3g}",
        f"{lag['p50']:,.1f}",
        f"{lag['p99']:,.1f}",
        f"{one['stall_s'].get(WAITED, 0.0):,.1f}",
        f"{one['sink']['peak_tokens']:,}",
        f"{one['source']['cpu_ms_a_request']:.3g}, {one['sink']['cpu_ms_a_request']:.3g}",
    )
    return f"| {' | '.join(cells)} |"


def _verdict(found: dict[str, Any]) -> str:
    if "absent" in found:
        return f"Memory needed for the same p99: absent ({found['absent']})."
    times = 1 / found["windows_to_whole"]
    if found["whole_tokens"] is None:
        return (
            f"For the same p99 whole payloads need more than {times:.3g} times the sink's memory."
        )
    if found["whole_tokens"] == found["whole_least_tokens"]:
        return (
            f"Whole payloads need room for the largest one, {times:.3g} times the windows' memory, "
            "whatever the p99."
        )
    return f"For the same p99 whole payloads need {times:.3g} times the sink's memory."
