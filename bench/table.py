"""`python -m bench.table`: the tables and the plots, from the newest result or a named one.

The README has a short one, and what was missed by most; docs/performance.md has all of it, and what a
replay says, `bench/results/replay-DATE-MACHINE.json`. A result in whose run others took over OTHERS_MAX
cores is refused; `--anyway` takes it.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from bench import aims, replayed
from bench.plot import svg
from bench.served import ROOT

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "bench" / "pieces.svg"
LIVE_PLOT = ROOT / "bench" / "live.svg"
RESULTS = ROOT / "bench" / "results"
ALL = "docs/performance.md#every-figure-and-its-aim"  # from the README
OTHERS_MAX = 0.2  # cores; with more taken, a run shows that it works, and no more
OURS_GO_BY = "reno"  # within a host, whatever the host's choice; so does raw TCP
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
# The README's, as far as they were measured.
SHORT = ("raw", "plain", "checksum", "nixl_write", "nixl_read", "mooncake")
MISSED_SHOWN = 4
BY_HOSTS_CHOICE = ("zeromq", "nixl_write", "nixl_read", "mooncake")
NOTE = "<sup>1</sup>"
NOTED_AIM = "stream_to_nixl_write", "stream_checksum_to_nixl_write"
REACHED = {True: "yes", False: "no"}


class Refused(Exception):
    """A result that must not be shown; the message says why."""


def newest(results: Path = RESULTS) -> Path:
    """The whole result of the latest date: replays and single parts are none."""
    dates = {}
    for path in results.glob("*.json"):
        told = json.loads(path.read_text())
        if "pieces" in told.get("parts", ()):
            dates[path] = str(told["date"])
    return max(dates, key=dates.__getitem__)


def refuse_disturbed(result: dict[str, Any]) -> None:
    """Refused, if others took so much of the machine that its figures are good for nothing."""
    if result["others_cores"] > OTHERS_MAX:
        raise Refused(
            f"others took {result['others_cores']} cores, more than {OTHERS_MAX}: such a run is good "
            "for nothing but to see that it works; --anyway shows it"
        )


def with_replay(result: dict[str, Any], replay: Path | None) -> dict[str, Any]:
    """The result, its aim of the replay judged anew: a replay may be committed later."""
    judged = aims.judge({"replay": replayed.part(replay)})
    names = {one["name"] for one in judged}
    return {**result, "aims": [one for one in result["aims"] if one["name"] not in names] + judged}


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
    """A poll to a bare echo, and a chunk to one of daemons that have no other, by what is live."""
    live = result["parts"]["live"]
    counts = sorted(int(name.split("_")[1]) for name in live if name.endswith("_poll_to_echo"))
    return {
        f"{count:,} live": [
            live.get(f"live_{count}_{name}", {}).get("median")
            for name in ("poll_to_echo", "chunk_to_alone")
        ]
        for count in counts
    }


def short(result: dict[str, Any]) -> str:
    """For the README: the ways that matter most, how many aims were reached, and the worst misses."""
    machine = result["machine"]
    rows = rows_of(result)
    names = tuple(name for name in SHORT if any(value is not None for value in rows[WAYS[name]]))
    measured = (
        f"{_moved(result)} of one machine ({machine['cores']} cores, {machine['cpu']}, "
        f"{result['date'][:10]}), GB/s, medians:"
    )
    lines = [measured, "", *_throughput(result, names, is_noted=False), ""]
    if _is_noted(machine):
        choice = machine["tcp_congestion_control"]
        note = (
            f"NIXL and Mooncake go by the host's congestion control, here {choice}, the others by "
            f"{OURS_GO_BY}: part of what kvferry is ahead of them by is this."
        )
        lines += [note, ""]
    return "\n".join([*lines, *_aims_in_short(result["aims"])]) + "\n"


def _aims_in_short(judged: list[dict[str, Any]]) -> list[str]:
    known = [aim for aim in judged if aim["reached"] is not None]
    missed = sorted((aim for aim in known if not aim["reached"]), key=missed_by, reverse=True)
    absent = sum(aim["value"] == "absent" for aim in judged)
    told = (
        f"Aims reached on this machine: {len(known) - len(missed)} of {len(known)}; figures that "
        f"could not be measured on it: {absent}. All of them: [docs/performance.md]({ALL})."
    )
    if not missed:
        return [told]
    worst = [
        f"- {aim['words']}: {_cell(aim['value'])}, aim {aim['aim']}"
        for aim in missed[:MISSED_SHOWN]
    ]
    return [f"{told} Missed by most:", "", *worst]


def missed_by(aim: dict[str, Any]) -> float:
    """How many times as good a figure would have to be."""
    op, words = aim["aim"].split()
    value, bound = float(aim["value"]), float(words)
    needed, had = (bound, value) if op == ">=" else (value, bound)
    return needed / had if had else math.inf


def markdown(result: dict[str, Any]) -> str:
    """Both whole tables, and what they were measured on."""
    machine = result["machine"]
    measured_on = (
        f"{machine['cores']} cores, {machine['cpu']}, {result['date'][:10]}; load average "
        f"{result['load_before'][0]} before and {result['load_after'][0]} after, "
        f"{result['others_cores']} cores taken by others. {_moved(result)}, GB/s, medians:"
    )
    is_noted = _is_noted(machine)
    lines = [measured_on, "", *_throughput(result, tuple(WAYS), is_noted)]
    lines += ["", "| figure | value | aim | reached |", "|---|---|---|---|"]
    lines += [_aim(aim, is_noted and aim["name"] in NOTED_AIM) for aim in result["aims"]]
    if is_noted:
        lines += ["", _note(machine["tcp_congestion_control"])]
    return "\n".join(lines) + "\n"


def _moved(result: dict[str, Any]) -> str:
    mib = result["parts"]["pieces"]["total_bytes"] >> 20
    return f"{mib} MiB in scattered pieces between two processes"


def _is_noted(machine: dict[str, Any]) -> bool:
    return bool(machine["tcp_congestion_control"] != OURS_GO_BY)


def _throughput(result: dict[str, Any], names: tuple[str, ...], is_noted: bool) -> list[str]:
    sizes = [name.replace("_", " ") for name in _sizes(result)]
    lines = [f"| | {' | '.join(sizes)} |", "|---|" + "---|" * len(sizes)]
    rows = rows_of(result)
    for name in names:
        note = NOTE if is_noted and name in BY_HOSTS_CHOICE else ""
        cells = " | ".join(_cell(value) for value in rows[WAYS[name]])
        lines.append(f"| {WAYS[name]}{note} | {cells} |")
    return lines


def _aim(aim: dict[str, Any], is_noted: bool) -> str:
    reached = "absent" if aim["value"] == "absent" else REACHED.get(aim["reached"], "")
    note = NOTE if is_noted else ""
    return f"| {aim['words']}{note} | {_cell(aim['value'])} | {aim['aim']} | {reached} |"


def _note(congestion: str) -> str:
    return (
        f"{NOTE} Between processes of one host kvferry's stream and raw TCP go by {OURS_GO_BY}, ZeroMQ, "
        f"NIXL and Mooncake by the host's choice, here {congestion}, which paces and costs the sender "
        "more. Part of what the stream is ahead of them by is this: see "
        "[below](#what-a-stream-costs-beside-bare-tcp)."
    )


def _cell(value: float | str | None) -> str:
    if value is None:
        return "absent"
    return value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def put_into(text: str, table: str, name: str = "bench") -> str:
    """A text with what stands between the two markers of this name replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + table + end + after


def texts(result: dict[str, Any], replay: Path | None) -> dict[Path, str]:
    """Every file that is made, as it has to be."""
    result = with_replay(result, replay)
    performance = put_into(PERFORMANCE.read_text(), markdown(result))
    if replay is not None:
        performance = put_into(performance, replayed.markdown(replay), "replay")
    sizes = [name.replace("_", " ") for name in _sizes(result)]
    plain = {words.replace("*", ""): row for words, row in rows_of(result).items()}
    columns = ["poll to echo", "chunk to alone"]
    return {
        README: put_into(README.read_text(), short(result)),
        PERFORMANCE: performance,
        PLOT: svg(plain, sizes, "GB/s by size of pieces"),
        LIVE_PLOT: svg(live_rows(result), columns, "A poll, a bare echo being 1; a chunk"),
    }


def main() -> None:
    """Read the options; refuse, or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="else the newest")
    parser.add_argument("--replay", type=Path, help="else the newest")
    parser.add_argument("--anyway", action="store_true", help="a disturbed run, too")
    given = parser.parse_args()
    result = json.loads((given.result or newest()).read_text())
    try:
        if not given.anyway:
            refuse_disturbed(result)
    except Refused as why:
        sys.exit(str(why))
    for path, text in texts(result, given.replay or replayed.newest()).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
