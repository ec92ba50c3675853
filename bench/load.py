"""`python -m bench.load`: many transfers and calls at once, then minutes of traffic with kills.

What each part does, and what counts as a violation, stands in `bench.flood` and `bench.soak`. One
JSON object on stdout, a line a phase on stderr; the exit status is 1 if there was a violation.
"""

import argparse
import json
import os
import platform
import sys
import time
from typing import Any

from bench import flood, soak

SHORT_FLOOD = flood.FloodSize(transfers=200, calls_a_s=1000, seconds=2)
SHORT_SOAK = soak.SoakSize(
    restarts_s=5,
    warm_up_s=3,
    steady_s=5,
    at_once=8,
    worker_kill_s=1.5,
    daemon_kill_s=2,
    tombstone_s=8.0,
    stall_s=8.0,
    growth_bytes_max=None,
)


def say(words: str) -> None:
    """A line for who waits."""
    print(words, file=sys.stderr, flush=True)


def run(flood_size: flood.FloodSize | None, soak_size: soak.SoakSize | None) -> dict[str, Any]:
    """Everything, as one result."""
    result: dict[str, Any] = {
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load_before": os.getloadavg()[0],
        }
    }
    if flood_size is not None:
        begun_s = time.monotonic()
        result["flood"] = told = flood.measure(flood_size)
        rate, p99_us, lost = told["calls_a_s"], told["p99_us"], len(told["violations"])
        took_s = time.monotonic() - begun_s
        say(f"flood {took_s:.0f} s: {rate} calls/s, p99 {p99_us} us, {lost} violations")
    if soak_size is not None:
        result["soak"] = soak.measure(soak_size, say)
    parts = [result[name] for name in ("flood", "soak") if name in result]
    result["violations"] = [words for part in parts for words in part.pop("violations")]
    return result


def main() -> None:
    """Read the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the flood; 0: none")
    parser.add_argument("--transfers", type=int, default=2000, help="live at once in the flood")
    parser.add_argument(
        "--calls-a-s", type=float, default=flood.FloodSize.calls_a_s, help="in the flood"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak; 0: none")
    parser.add_argument("--short", action="store_true", help="both, much smaller, in half a minute")
    given = parser.parse_args()
    flood_size = flood.FloodSize(given.transfers, given.calls_a_s, given.seconds)
    soak_size = soak.SoakSize.of_minutes(given.minutes)
    if given.short:
        result = run(SHORT_FLOOD, SHORT_SOAK)
    else:
        result = run(
            flood_size if given.seconds > 0 else None, soak_size if given.minutes > 0 else None
        )
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["violations"] else 0)


if __name__ == "__main__":
    main()
