"""What the project aims at, each a figure of the same run; ratios wherever a machine matters."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Aim(NamedTuple):
    """``path`` leads to a figure of the result; ``*`` takes every entry, and the worst counts."""

    name: str
    words: str
    path: str
    op: str
    bound: float


TIMED = "timed"  # a figure that nobody has set a bound to
AIMS = (
    Aim("stream_plain_to_raw", "tcp stream without checksum to raw TCP, at every size",
        "pieces.*_KiB.plain_to_raw", ">=", 0.90),
    Aim("stream_checksum_to_raw", "tcp stream with checksum to raw TCP, at every size",
        "pieces.*_KiB.checksum_to_raw", ">=", 0.85),
    Aim("stream_to_mooncake", "tcp stream without checksum to Mooncake TE over tcp, which has none",
        "pieces.*_KiB.plain_to_mooncake", ">=", 1.5),
    Aim("stream_checksum_to_mooncake", "tcp stream with checksum to Mooncake TE over tcp",
        "pieces.*_KiB.checksum_to_mooncake", ">=", 1.5),
    Aim("stream_to_nixl_read", "tcp stream without checksum to NIXL READ over tcp, which has none",
        "pieces.*_KiB.plain_to_nixl_read", ">=", 1.5),
    Aim("stream_checksum_to_nixl_read", "tcp stream with checksum to NIXL READ over tcp",
        "pieces.*_KiB.checksum_to_nixl_read", ">=", 1.5),
    Aim("stream_to_nixl_write", "tcp stream without checksum to NIXL WRITE over tcp, which has none",
        "pieces.*_KiB.plain_to_nixl_write", ">=", 0.9),
    Aim("stream_checksum_to_nixl_write", "tcp stream with checksum to NIXL WRITE over tcp",
        "pieces.*_KiB.checksum_to_nixl_write", ">=", 0.9),
    Aim("offer_to_nixl_read", "nixl transport to bare NIXL READ of the same pieces, over tcp",
        "pieces.*_KiB.offer_to_nixl_read", ">=", 0.95),
    Aim("read_to_memcpy", "worker reading a window out of the pool to memcpy",
        "reading.read_to_memcpy", ">=", 0.85),
    Aim("windows_to_whole", "windows of 8,192 with sliding resume to one whole-size window",
        "windows.quarter_32768.*_to_whole", ">=", 0.95),
    Aim("handoff_us", "handoff of 1 GiB within one daemon, us",
        "handoff.microseconds", "<", 200),
    Aim("handoff_bytes_copied", "bytes copied by those handoffs",
        "handoff.bytes_copied", "<=", 0),
    Aim("poll_to_echo", "poll p50 to a bare ROUTER echo's",
        "messages.poll_to_echo", "<=", 1.25),
    Aim("poll_rate_to_echo", "polls/s to echoes/s at 32 outstanding",
        "messages.poll_rate_to_echo", ">=", 0.5),
    Aim("live_most_to_fewest", "cost of a poll at 10,000 live transfers to its cost at 10",
        "live.most_to_fewest", "<=", 1.1),
    Aim("chunk_most_to_fewest", "CPU of a chunk at 10,000 live transfers to its CPU at 10",
        "live.chunk_most_to_fewest", "<=", 1.1),
    Aim("loop_work_max_ms", "event loop: most work of its own in a turn, payloads moving, ms",
        "windows.*.lag.*.loop.turns.work_max_ms", "<=", 1),
    Aim("loop_turn_max_ms", "event loop: its longest turn, waiting for the GIL or a core too, ms",
        "windows.*.lag.*.loop.turns.max_ms", "<=", 1),
    Aim("loop_late_max_ms", "event loop: at its latest, ten looks a second, ms (1 is the timer's)",
        "windows.*.lag.*.loop.late_max_ms", "<=", 1),
    Aim("board_poll_us", "poll by status board, us",
        "board.unchanged_p50_us", "<=", 1),
    Aim("batch_transfers_per_s", "transfers/s by batch polls",
        "messages.batch_transfers_per_s", ">=", 500_000),
    Aim("take_give_64_ns", "take and give back 64 blocks, ns",
        "allocator.grant_free_64_ns", "<=", 1000),
    Aim("ready_seconds", "daemon start to ready, s",
        "start.ready_seconds", "<", 0.5),
    Aim("rss_empty_mib", "RSS of an empty daemon, MiB",
        "start.rss_empty_mib", "<", 62),
    Aim("waiting_core_percent", "% of a core with 1,000 waiting transfers, either daemon",
        "waiting.*_core_percent", "<", 1),
    Aim("rss_kib_per_transfer", "RSS of a sink that waits for its source, KiB",
        "waiting.rss_kib_per_transfer", "<=", 10),
    Aim("rss_kib_per_holding_source", "RSS of a source that holds a window, KiB",
        "waiting.rss_kib_per_holding_source", "<=", 10),
    Aim("rss_kib_per_holding_sink", "RSS of a sink that holds a window, KiB",
        "waiting.rss_kib_per_holding_sink", "<=", 10),
    Aim("engine_first_token", "end of prefill to decode's first token, to vLLM's own connectors",
        "engines.kvferry_to_*_first_token", "<=", 1),
    Aim("engine_first_token_two_daemons", "the same by two daemons, as between two nodes",
        "engines.two_daemons_to_*_first_token", "<=", 1),
    Aim("engine_pinned", "how long a dead decode pins prefill's blocks, vLLM's NixlConnector to ours",
        "engines.pinned_nixl_to_kvferry", ">=", 10),
    Aim("gather_to_copy", "gather of all layers in a GPU to its own copy of as many bytes",
        "paged.*_KiB.gather_to_copy", ">=", 0.85),
    Aim("scatter_to_copy", "scatter of all layers in a GPU to its own copy of as many bytes",
        "paged.*_KiB.scatter_to_copy", ">=", 0.85),
    Aim("gpu_handoff_us", "handoff of 1 GiB of a GPU's memory within one daemon, us",
        "gpu.handoff_us", "<", 200),
    Aim("gpu_handoff_bytes_copied", "bytes copied by those handoffs",
        "gpu.handoff_bytes_copied", "<=", 0),
    Aim("gpu_open_ms", "a worker connects and opens a pool in a GPU by CUDA IPC, ms",
        "gpu.open_ms", TIMED, 0),
    Aim("sink_memory", "sink memory that windows need to what whole payloads need, same p99",
        "replay.windows_to_whole", "<=", 0.25),
)  # fmt: skip
REACHED: dict[str, Callable[[float, float], bool | None]] = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
    TIMED: lambda _value, _bound: None,
}


def judge(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every aim whose part was run: its worst figure, and whether it is reached.

    A figure that could not be measured has the value "absent" and is neither reached nor missed; so
    is one that has no bound.
    """
    found = []
    for aim in AIMS:
        figures = list(_figures(parts, aim.path.split(".")))
        if not figures:
            continue
        absent = [one["absent"] for one in figures if isinstance(one, dict) and "absent" in one]
        row: dict[str, Any] = {
            "name": aim.name,
            "words": aim.words,
            "aim": aim.op if aim.op == TIMED else f"{aim.op} {aim.bound:g}",
        }
        if absent:
            row |= {"value": "absent", "reason": absent[0], "reached": None}
        else:
            medians = [one["median"] if isinstance(one, dict) else one for one in figures]
            worst = min(medians) if aim.op == ">=" else max(medians)
            row |= {"value": worst, "reached": REACHED[aim.op](worst, aim.bound)}
        found.append(row)
    return found


def _figures(tree: Any, path: list[str]) -> Iterator[Any]:
    """An absent part is absent in all its figures."""
    if not path or (isinstance(tree, dict) and "absent" in tree):
        yield tree
        return
    if not isinstance(tree, dict):
        return
    step, *rest = path
    for name, below in tree.items():
        if fnmatchcase(name, step):
            yield from _figures(below, rest)
