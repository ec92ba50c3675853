"""`python -m bench.table`: the README's tables and the plots, from the newest result or a named one.

A result in whose run others took over OTHERS_MAX cores is refused; `--anyway` takes it. What a replay
says, `bench/results/replay-DATE-MACHINE.json`, goes into the README and docs/performance.md.
"""

import argparse
import json
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
    is_noted = machine["tcp_congestion_control"] != OURS_GO_BY
    lines = [
        measured_on,
        "",
        f"| | {' | '.join(sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for name, (words, row) in zip(WAYS, rows_of(result).items(), strict=True):
        note = NOTE if is_noted and name in BY_HOSTS_CHOICE else ""
        lines.append(f"| {words}{note} | {' | '.join(_cell(value) for value in row)} |")
    lines += ["", "| figure | value | aim | reached |", "|---|---|---|---|"]
    lines += [_aim(aim, is_noted and aim["name"] in NOTED_AIM) for aim in result["aims"]]
    if is_noted:
        lines += ["", _note(machine["tcp_congestion_control"])]
    return "\n".join(lines) + "\n"


def _aim(aim: dict[str, Any], is_noted: bool) -> str:
    reached = "absent" if aim["value"] == "absent" else REACHED.get(aim["reached"], "")
    note = NOTE if is_noted else ""
    return f"| {aim['words']}{note} | {_cell(aim['value'])} | {aim['aim']} | {reached} |"


def _note(congestion: str) -> str:
    return (
        f"{NOTE} Between processes of one host kvferry's stream and raw TCP go by {OURS_GO_BY}, ZeroMQ, "
        f"NIXL and Mooncake by the host's choice, here {congestion}, which paces and costs the sender "
        "more. Part of what the stream is ahead of them by is this: see "
        "[docs/performance.md](docs/performance.md#what-a-stream-costs-beside-bare-tcp)."
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


def show(result: dict[str, Any], replay: Path | None) -> None:
    """Write all files."""
    result = with_replay(result, replay)
    readme = put_into(README.read_text(), markdown(result))
    if replay is not None:
        table = replayed.markdown(replay)
        readme = put_into(readme, table, "replay")
        PERFORMANCE.write_text(put_into(PERFORMANCE.read_text(), table, "replay"))
    README.write_text(readme)
    sizes = [name.replace("_", " ") for name in _sizes(result)]
    plain = {words.replace("*", ""): row for words, row in rows_of(result).items()}
    PLOT.write_text(svg(plain, sizes, "GB/s by size of pieces"))
    columns = ["poll to echo", "chunk to alone"]
    LIVE_PLOT.write_text(svg(live_rows(result), columns, "A poll, a bare echo being 1; a chunk"))


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
    show(result, given.replay or replayed.newest())


if __name__ == "__main__":
    main()
