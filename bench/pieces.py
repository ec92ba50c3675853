"""The same bytes in scattered pieces from one process's pool to another's, in every way there is.

The rounds of all ways are interleaved. In its turn a way moves everything twice, and the second
time counts: a connection that was idle during the others' turns starts slowly, by half at worst.
Received bytes are compared with what was sent after every round. NIXL and Mooncake run in a venv of their own (`make bench-peers`); where one is not there,
its figures are replaced by the reason.
"""

import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import absent, rates, ratios
from bench.pair import EndGone, Pair
from bench.served import ROOT
from bench.ways.end import scattered
from kvferry_daemon.memory.host import HostPool

TOTAL_BYTES = 256 << 20
PIECES_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
ROUNDS = 7
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
WAYS = {
    "memcpy": ["memcpy"],
    "raw": ["raw"],
    "zeromq": ["zeromq"],
    "plain": ["stream", "plain"],
    "checksum": ["stream", "checksum"],
    "tls": ["stream", "tls"],
    "offer": ["offer"],
}
OPTIONAL = {"offer": "nixl", "tls": "cryptography"}  # ours, but for packages that need not be there
PEERS = {
    "nixl_read": ["nixl", "READ"],
    "nixl_write": ["nixl", "WRITE"],
    "mooncake": ["mooncake"],
}
OURS = ("plain", "checksum")
YARDSTICKS = ("raw", "zeromq", *PEERS)


class Pools:
    """Two pool files: the source's with random bytes, and the sink's."""

    def __init__(self, root: Path, total_bytes: int) -> None:
        self.source = HostPool.create(root / "source", total_bytes, 1)
        self.sink = HostPool.create(root / "sink", total_bytes, 1)
        self.paths = {"source": self.source.path, "sink": self.sink.path}
        self._words = {
            role: np.frombuffer(pool.view(0, 1), dtype=np.uint64)
            for role, pool in (("source", self.source), ("sink", self.sink))
        }
        generator = np.random.default_rng(1)
        self._words["source"][:] = generator.integers(0, 1 << 63, total_bytes // 8, dtype=np.uint64)

    def check(self, piece_bytes: int) -> None:
        """Every piece is where it must be, byte for byte."""
        source, sink = (
            [
                words[offset // 8 : (offset + piece_bytes) // 8]
                for offset in scattered(words.nbytes, piece_bytes, role)
            ]
            for role, words in self._words.items()
        )
        for sent, received in zip(source, sink, strict=True):
            assert np.array_equal(sent, received), "received bytes are not what was sent"


def measure(
    total_bytes: int = TOTAL_BYTES,
    pieces_bytes: tuple[int, ...] = PIECES_BYTES,
    rounds: int = ROUNDS,
    peers_python: Path = PEERS_PYTHON,
) -> dict[str, Any]:
    """Every size of pieces, all ways."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root, ExitStack() as stack:
        pools = Pools(Path(root), total_bytes)
        pairs: dict[str, Pair] = {}
        missing: dict[str, str] = {}
        for name, way in WAYS.items():
            if name in OPTIONAL and find_spec(OPTIONAL[name]) is None:
                missing[name] = f"not installed: {OPTIONAL[name]}"
                continue
            pairs[name] = Pair(Path(sys.executable), way, pools.paths, Path(root))
            stack.callback(pairs[name].close)
        for name, way in PEERS.items():
            try:
                pairs[name] = Pair(_installed(peers_python), way, pools.paths, Path(root))
                stack.callback(pairs[name].close)
            except EndGone as error:
                missing[name] = str(error)
        sizes = {
            f"{size >> 10}_KiB": _measure_size(pools, pairs, missing, size, rounds)
            for size in pieces_bytes
        }
        return {"total_bytes": total_bytes, "rounds": rounds, "bytes_verified": True, **sizes}


def _installed(python: Path) -> Path:
    if not python.exists():
        raise EndGone("not installed: make bench-peers")
    return python


def _measure_size(
    pools: Pools, pairs: dict[str, Pair], missing: dict[str, str], piece_bytes: int, rounds: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(rounds):
        for name in list(pairs):
            try:
                pairs[name].move(piece_bytes)
                pools.sink.zero(0, 1)
                seconds[name].append(pairs[name].move(piece_bytes))
            except EndGone as error:
                if name not in PEERS:
                    raise
                missing[name] = str(error)
                pairs.pop(name)
                continue
            pools.check(piece_bytes)
    total_bytes = pools.sink.block_bytes
    found = {f"{name}_gb_per_s": rates(total_bytes, seconds[name]) for name in pairs}
    found |= {f"{name}_gb_per_s": absent(why) for name, why in missing.items()}
    found["offer_to_nixl_read"] = (
        absent(" or ".join(missing[name] for name in ("offer", "nixl_read") if name in missing))
        if missing.keys() & {"offer", "nixl_read"}
        else ratios(seconds["nixl_read"], seconds["offer"])
    )
    found["tls_to_plain"] = (
        absent(missing["tls"]) if "tls" in missing else ratios(seconds["plain"], seconds["tls"])
    )
    for ours in OURS:
        for other in YARDSTICKS:
            found[f"{ours}_to_{other}"] = (
                absent(missing[other]) if other in missing
                else ratios(seconds[other], seconds[ours])
            )  # fmt: skip
    return found
