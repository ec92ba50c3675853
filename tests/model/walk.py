"""`python -m model.walk` (with PYTHONPATH=tests): every world, with the number of its states."""

import sys
import time

from model.explore import explore
from model.setups import LARGE, SMALL


def main() -> int:
    """Exit status 1 if a rule is broken or something is stuck."""
    bad = 0
    for setup in (*SMALL, *LARGE):
        start_s = time.perf_counter()
        found = explore(setup)
        took_s = time.perf_counter() - start_s
        print(f"{setup.name}: {found.states} states, {took_s:.0f} s", flush=True)
        if found.problem is not None:
            bad += 1
            print(f"  {found.problem}", *found.story, sep="\n    ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
