"""`python -m bench.table`: the README's table and the plots, from the newest result or a named one."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.plot import svg
from bench.served import ROOT

README = ROOT / "README.md"
PLOT = ROOT / "bench" / "pieces.svg"
LIVE_PLOT = ROOT / "bench" / "live.svg"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->\n"
WAYS = {
    "memcpy": "memcpy, one thread",
    "raw": "raw TCP",
    "plain": "**kvferry tcp**",
    "checksum": "**kvferry tcp, checksum**",
    "zeromq": "ZeroMQ tcp",
    "nixl_write": "NIXL WRITE, tcp",
    "nixl_read": "NIXL READ, tcp",
    "mooncake": "Mooncake TE, tcp",
}
REACHED = {True: "yes", False: "no", None: "absent"}


def newest() -> Path:
    """The result of the latest date."""
    return max(RESULTS.glob("*.json"), key=lambda path: str(json.loads(path.read_text())["date"]))


def rows_of(result: dict[str, Any]) -> dict[str, list[float | None]]:
    """GB/s of each way, a figure a size of pieces; None where it is absent."""
    sizes = _sizes(result)
    return {
        words: [size[f"{name}_gb_per_s"].get("median") for size in sizes.values()]
        for name, words in WAYS.items()
    }


def _sizes(result: dict[str, Any]) -> dict[str, Any]:
    pieces = result["parts"]["pieces"]
    return {name: size for name, size in pieces.items() if name.endswith("_KiB")}


def live_rows(result: dict[str, Any]) -> dict[str, list[float | None]]:
    """A poll's round trip to a bare echo's, by how many transfers are live."""
    live = result["parts"]["live"]
    counts = sorted(int(name.split("_")[1]) for name in live if name.endswith("_poll_to_echo"))
    return {f"{count:,} live": [live[f"live_{count}_poll_to_echo"]["median"]] for count in counts}


def markdown(result: dict[str, Any]) -> str:
    """Both tables, and what they were measured on."""
    machine = result["machine"]
    sizes = [name.replace("_", " ") for name in _sizes(result)]
    mib = result["parts"]["pieces"]["total_bytes"] >> 20
    measured_on = (
        f"{machine['cores']} cores, {machine['cpu']}, {result['date'][:10]}; load average "
        f"{result['load_before'][0]} before and {result['load_after'][0]} after, "
        f"{result['others_cores']} cores taken by others. {mib} MiB in scattered pieces between "
        "two processes, GB/s, medians:"
    )
    lines = [
        measured_on,
        "",
        f"| | {' | '.join(sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for words, row in rows_of(result).items():
        lines.append(f"| {words} | {' | '.join(_cell(value) for value in row)} |")
    lines += ["", "| figure | value | aim | reached |", "|---|---|---|---|"]
    for aim in result["aims"]:
        lines.append(
            f"| {aim['words']} | {_cell(aim['value'])} | {aim['aim']} | {REACHED[aim['reached']]} |"
        )
    return "\n".join(lines) + "\n"


def _cell(value: float | str | None) -> str:
    if value is None:
        return "absent"
    return value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def put_into(text: str, table: str) -> str:
    """A text with what stands between the two markers replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table + END + after


def main() -> None:
    """Write all three files."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    result = json.loads(path.read_text())
    README.write_text(put_into(README.read_text(), markdown(result)))
    sizes = [name.replace("_", " ") for name in _sizes(result)]
    plain = {words.replace("*", ""): row for words, row in rows_of(result).items()}
    PLOT.write_text(svg(plain, sizes, "GB/s by size of pieces"))
    LIVE_PLOT.write_text(svg(live_rows(result), ["poll to echo"], "A poll, a bare echo being 1"))


if __name__ == "__main__":
    main()
