"""``python -m sim.run --seed N``, or ``--seeds N --first M --jobs 2`` (with PYTHONPATH=tests)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from kvferry_daemon.core.pool import PoolError
from kvferry_proto.errors import FerryError
from sim.draw import draw
from sim.world import Plan, World

# What a broken core may raise, beside what the invariants do.
MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, FerryError, LookupError, PoolError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
SALTS = 8  # a shorter story may need other dice: how many are tried
CHUNK = 50
SHOWN = 20  # failures in words; the others are only counted


def failure_of(plan: Plan, salt: int = 0) -> str | None:
    """Run a plan; what went wrong, in words, or None."""
    try:
        World(plan, salt=salt).run()
    except MISTAKES as error:
        return f"{type(error).__name__}: {error}"
    return None


def story_of(plan: Plan, salt: int = 0) -> list[str]:
    """The same with every event and effect told."""
    world = World(plan, salt=salt, tell=True)
    try:
        world.run()
    except MISTAKES as error:
        world.say("world", "BROKEN", f"{type(error).__name__}: {error}")
    return world.story or []


def shrink(plan: Plan, salt: int = 0) -> tuple[Plan, int]:
    """Drop faults and requests, one by one, as long as something of the same kind goes wrong."""
    kind = _kind(failure_of(plan, salt))
    shorter = True
    while shorter:
        shorter = False
        for smaller in _smaller(plan):
            found = [s for s in range(SALTS) if _kind(failure_of(smaller, s)) == kind]
            if found:
                plan, salt, shorter = smaller, found[0], True
                break
    events = {
        s: len(story_of(plan, s)) for s in range(4 * SALTS) if _kind(failure_of(plan, s)) == kind
    }
    return plan, min(events, key=events.__getitem__) if events else salt


def _kind(failure: str | None) -> str | None:
    """Two failures of one kind are taken for the same mistake."""
    return None if failure is None else failure[: failure.find(":", 14) + 1] or failure[:14]


def _smaller(plan: Plan) -> Iterable[Plan]:
    for index in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:index] + plan.faults[index + 1 :])
    if len(plan.jobs) > 1:
        for index in range(len(plan.jobs)):
            yield replace(plan, jobs=plan.jobs[:index] + plan.jobs[index + 1 :])
    for index, job in enumerate(plan.jobs):
        for change in (
            {"ranks": 1, "ranks_sink": 1}, {"ranks": min(2, job.ranks), "ranks_sink": min(2, job.ranks_sink)}, {"tokens": job.tokens // 2}, {"start_sink": 0, "start_source": 0}, {"goodbye": False},
            {"late": False}, {"eager": True},
        ):  # fmt: skip
            other = replace(job, **change)
            if other != job:
                yield replace(plan, jobs=(*plan.jobs[:index], other, *plan.jobs[index + 1 :]))
    if plan.streams > 1:
        yield replace(plan, streams=1)
    if plan.aux:
        yield replace(plan, aux=False)


def failures(first: int, seeds: int) -> list[tuple[int, str]]:
    """Run so many seeds; those that failed, and how."""
    found = ((seed, failure_of(draw(seed))) for seed in range(first, first + seeds))
    return [(seed, failure) for seed, failure in found if failure is not None]


def _many(first: int, seeds: int, jobs: int) -> int:
    started_s = time.perf_counter()
    firsts = range(first, first + seeds, CHUNK)
    sizes = [min(CHUNK, first + seeds - one) for one in firsts]
    bad = 0
    with ProcessPoolExecutor(jobs) as pool:
        for found in pool.map(failures, firsts, sizes):
            for seed, failure in found:
                bad += 1
                if bad <= SHOWN:
                    print(f"seed {seed}: {failure[:300]!r}", flush=True)
    took_s = time.perf_counter() - started_s
    print(f"{seeds} seeds in {took_s:.1f} s, {seeds / took_s:.0f} a second, {bad} failed")
    return 1 if bad else 0


def _one(seed: int, *, shorter: bool) -> int:
    plan, salt = draw(seed), 0
    failure = failure_of(plan)
    if failure is not None and shorter:
        plan, salt = shrink(plan)
    for line in story_of(plan, salt):
        print(line)
    print(f"{plan}\nsalt {salt}")
    print(f"seed {seed}: {failure or 'ended well'}")
    return 1 if failure else 0


def main() -> int:
    """Exit status 1 if a seed fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run one and tell its story")
    parser.add_argument("--shrink", action="store_true", help="find a shorter story that fails")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    if args.seed is not None:
        return _one(args.seed, shorter=args.shrink)
    return _many(args.first, args.seeds, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
