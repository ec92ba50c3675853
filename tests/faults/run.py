"""`python -m faults.run`: the whole matrix, or what a filter leaves of it."""

import argparse
import contextlib
import io
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from faults.cases import matrix, sample
from faults.scene import Case, Scene
from kvferry_proto.errors import FerryError


def played(case: Case) -> str:
    """Run one case; return what went wrong."""
    with tempfile.TemporaryDirectory(prefix="kvferry-faults-") as directory:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                with Scene(Path(directory), case) as scene:
                    scene.run()
            except (AssertionError, OSError, ValueError, FerryError):
                traceback.print_exc(file=said)
                return said.getvalue()
    return ""


def in_child(case: Case) -> str:
    """The same in a process of its own, so that cases may run side by side."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    child = get_context("spawn").Process(target=_child, args=(case, sender))
    child.start()
    sender.close()
    try:
        said: str = receiver.recv()
    except EOFError:
        said = "the case's process died"
    child.join()
    return said


def _child(case: Case, sender: object) -> None:
    sender.send(played(case))  # type: ignore[attr-defined]


def main() -> int:
    """Say how every case went; 1 if one went wrong."""
    parser = argparse.ArgumentParser(prog="faults.run", description=__doc__)
    parser.add_argument("--all", action="store_true", help="not only the tests' sample")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    cases = matrix(given.seed) if given.all or given.only else sample(given.seed)
    cases = [case for case in cases if given.only in str(case)]
    if given.list:
        print(*cases, sep="\n")
        return 0
    start_s, failed = time.monotonic(), 0
    with ThreadPoolExecutor(given.jobs) as pool:
        running = {pool.submit(in_child, case): case for case in cases}
        for number, done in enumerate(as_completed(running), 1):
            failed += bool(done.result())
            word = "FAILED" if done.result() else "ok"
            print(f"{number}/{len(cases)} {word} {running[done]}", flush=True)
            if done.result():
                print(done.result(), flush=True)
    print(f"{len(cases) - failed} passed, {failed} failed, {time.monotonic() - start_s:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
