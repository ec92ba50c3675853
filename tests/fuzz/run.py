"""The long form: `make fuzz FRAMES=10000000`. Ends with the target and the seed of the first breach.

Every round has a seed of its own: `--only TARGET --first SEED --frames 1` plays it again (nearly so
for `sockets`, whose daemon takes its own time and ids). What was found is kept as a test.
"""

import argparse
import logging
import multiprocessing
import resource
import sys
import time
from contextlib import closing
from random import Random

from fuzz.targets import TARGETS

ROUND_FRAMES = 5_000
# Rounds of each target out of twelve: a file or a socket takes many times as long as a decoder.
SHARES = {"decoding": 3, "bytes": 2, "lives": 2, "ledgers": 2, "sockets": 2, "files": 1}
GROWTH_MIB = 100  # of a process, from its first round on: frames leave nothing behind


def rss_mib() -> float:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def play(job: tuple[str, int]) -> float:
    """One round of a target; return the process's memory after it."""
    name, seed = job
    try:
        with closing(TARGETS[name](Random(seed))) as target:
            for _ in range(ROUND_FRAMES):
                target()
    except Exception as error:
        raise RuntimeError(f"{name}, seed {seed}: {error!r}") from error
    return rss_mib()


def main() -> None:
    """Play rounds until all frames were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first round")
    parser.add_argument("--only", choices=sorted(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    names = [given.only] if given.only else [name for name in SHARES for _ in range(SHARES[name])]
    rounds = -(-given.frames // ROUND_FRAMES)
    jobs = [(names[n % len(names)], given.first + n) for n in range(rounds)]
    begun_s, first_mib, most_mib, done = time.monotonic(), 0.0, 0.0, 0
    quiet = logging.disable  # each file that is set aside is an error in the log
    with multiprocessing.get_context("spawn").Pool(given.jobs, quiet) as pool:
        for mib in pool.imap_unordered(play, jobs):
            done += 1
            most_mib = max(most_mib, mib)
            first_mib = first_mib if done > 8 * len(names) else most_mib
    seconds = time.monotonic() - begun_s
    print(
        f"{done * ROUND_FRAMES} frames in {seconds:.0f} s, no breach; "
        f"{most_mib:.0f} MiB at most, {most_mib - first_mib:.1f} more than after the first rounds"
    )
    if most_mib - first_mib > GROWTH_MIB:
        sys.exit("memory grows")


if __name__ == "__main__":
    main()
