"""`python -m bench.budget`: the budget of one chunk, stage by stage, at both daemons.

1 GiB of Llama-3-8B's KV in windows of 2,048 tokens between two daemons whose stages have clocks
(`bench/staged.py`). CPU of a stage's own thread, a chunk; the clocks themselves cost some, so what
matters is how the parts compare. docs/performance.md says what follows from it.
"""

import time
from contextlib import ExitStack
from typing import Any

from bench.watched import WatchedDaemon
from bench.windows import CASES, Case, Scene

WINDOW_TOKENS = 2048
ROUNDS = 4
CASE = CASES["llama_8192"]


class StagedDaemon(WatchedDaemon):
    """A daemon whose stages have clocks; it reports what these show."""

    def _program(self) -> list[str]:
        return ["bench.staged", str(self.report_path)]


def measure(case: Case = CASE, rounds: int = ROUNDS) -> dict[str, Any]:
    """By daemon, microseconds of CPU a chunk by stage, how often it is passed a chunk, and sums."""
    with ExitStack() as stack:
        scene = Scene(case, stack, StagedDaemon)
        daemons = {
            name: one for name, one in scene.daemons.items() if isinstance(one, StagedDaemon)
        }
        scene.take_windows(WINDOW_TOKENS, scene.payload.check)
        before = {name: one.report() for name, one in daemons.items()}
        chunks_before = daemons["sink"].status().counters["chunks_received"]
        begun = time.monotonic()
        for _ in range(rounds):
            scene.take_windows(WINDOW_TOKENS, scene.payload.glance)
        took_s = time.monotonic() - begun
        chunks = daemons["sink"].status().counters["chunks_received"] - chunks_before
        found: dict[str, Any] = {
            "chunks": chunks,
            "chunk_bytes": rounds * scene.total_bytes // chunks,
            "wall_us": round(took_s / chunks * 1e6, 1),
        }
        for name, one in daemons.items():
            found[name] = _spent(before[name], one.report(), chunks)
        return found


def _spent(before: dict[str, Any], after: dict[str, Any], chunks: int) -> dict[str, Any]:
    stages = {
        stage: {
            "us": round((cpu_ns - before["cpu_ns"].get(stage, 0)) / chunks / 1000, 1),
            "times": round((after["calls"][stage] - before["calls"].get(stage, 0)) / chunks, 2),
        }
        for stage, cpu_ns in after["cpu_ns"].items()
    }
    sums = {
        name: round((after[name] - before[name]) / chunks / 1000, 1)
        for name in ("loop_ns", "all_ns")
    }
    return {"stages": stages, "loop_us": sums["loop_ns"], "all_us": sums["all_ns"]}


def main() -> None:
    """Measure, and print a table."""
    found = measure()
    print(f"{found['chunks']} chunks of {found['chunk_bytes']} bytes, {found['wall_us']} us each")
    for name in ("source", "sink"):
        told = found[name]
        print(f"\n{name}: {told['all_us']} us of CPU a chunk, {told['loop_us']} on the event loop")
        for stage, one in sorted(told["stages"].items(), key=lambda row: -row[1]["us"]):
            if one["times"]:
                print(f"  {one['us']:8.1f} us  {one['times']:6.2f} times  {stage}")


if __name__ == "__main__":
    main()
