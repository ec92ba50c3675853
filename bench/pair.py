"""Two processes, the ends of one way of moving bytes, started and driven in step."""

import json
import select
import subprocess
from pathlib import Path
from typing import Any

from bench.served import ROOT

WAIT_S = 60.0


class EndGone(Exception):
    """An end has died, or says nothing any more; the message is the last it wrote."""


class EndProcess:
    """One `bench.ways` process."""

    def __init__(self, python: Path, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(python), "-m", *command],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def tell(self, words: Any) -> None:
        """Let it begin with something."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(words), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise EndGone(self.last_words()) from error

    def told(self) -> Any:
        """What came of it."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], WAIT_S)[0]:
            raise EndGone(f"silent for {WAIT_S:g} s: {self.last_words()}")
        line = self.process.stdout.readline()
        if not line:
            raise EndGone(self.last_words())
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def last_words(self) -> str:
        """The last line that it wrote."""
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no word")


class Pair:
    """A source and a sink that have met."""

    def __init__(self, python: Path, way: list[str], pools: dict[str, Path], root: Path) -> None:
        name = "-".join(way)
        self._ends = [
            EndProcess(
                python, [f"bench.ways.{way[0]}", role, str(pool), *way[1:]],
                root / f"{name}-{role}.log",
            )
            for role, pool in pools.items()
        ]  # fmt: skip
        try:
            offers = [end.told() for end in self._ends]
            for end, offer in zip(self._ends, reversed(offers), strict=True):
                end.tell(offer)
            for end in self._ends:
                end.told()
        except EndGone:
            self.close()
            raise

    def move(self, piece_bytes: int) -> float:
        """Move the whole pool in pieces of this size; seconds from the first to the last byte.

        EndGone has what both ends wrote last: one may have failed because of the other.
        """
        try:
            for step in (piece_bytes, "go"):
                for end in reversed(self._ends):  # the sink first: it waits for the source
                    end.tell(step)
                answers = [end.told() for end in self._ends]
        except EndGone as error:
            raise EndGone("; ".join(end.last_words() for end in self._ends)) from error
        times = {name: at for answer in answers for name, at in answer.items()}
        return float(times["done"] - times["begun"])

    def close(self) -> None:
        """End both."""
        for end in self._ends:
            end.close()
