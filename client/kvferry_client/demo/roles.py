"""What the demo's worker processes have in common: arguments, lines of JSON, moving and hashing."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvferry_client import Client, FerryError, Pool, Receiving, WindowView, connect
from kvferry_client.session import CALL_S
from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import TERMINAL, Role

BLOCK_TOKENS = 128
PIECE_TOKENS = 1024
NEW_TOKENS = 32
SEED = 7
Arrays = dict[str, NDArray[Any]]


def parse() -> argparse.Namespace:
    """The arguments of every worker of the demo."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--runtime-dir", type=Path)
    parser.add_argument("--transfer-id")
    parser.add_argument("--source")
    parser.add_argument("--total-late", action="store_true")
    parser.add_argument("--harm", choices=["swap-windows", "zero-token"])
    return parser.parse_args()


def say(event: str, **fields: Any) -> None:
    """One line of JSON on stdout, for whoever runs the demo."""
    print(json.dumps({"event": event, **fields}), flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a worker; a refusal is one line on stderr, which says more than where we were."""
    try:
        main()
    except FerryError as error:
        sys.exit(str(error))


def layout_of(planes: list[tuple[str, str, tuple[int, ...]]], aux: tuple[str, ...]) -> Layout:
    """The layout of (name, dtype, shape of a token) planes."""
    return Layout(
        planes=tuple(Plane(name=n, dtype=Dtype(d), shape=s) for n, d, s in planes),
        aux=aux,
        block_size_tokens=BLOCK_TOKENS,
    )


class Digests:
    """A hash of every plane's bytes, in token order."""

    def __init__(self, names: Iterable[str]) -> None:
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in names}

    def add(self, arrays: Arrays) -> None:
        """The next tokens of every plane, each (tokens, *shape)."""
        for name, array in arrays.items():
            self._hashes[name].update(np.ascontiguousarray(array).data)

    def result(self) -> dict[str, str]:
        """Hex digests by plane."""
        return {name: one.hexdigest() for name, one in self._hashes.items()}


class MeteredClient(Client):
    """A client that times what it sees to be on its way, and tells of progress as it comes."""

    moving_s = 0.0
    moved_tokens = 0
    _before: worker.Snapshot | None = None
    _before_s = 0.0

    def call(self, call: Any, wait_s: float = CALL_S, pool: Pool | None = None) -> Any:
        """Look at every snapshot that passes."""
        reply = super().call(call, wait_s, pool)
        for snapshot in getattr(reply, "transfers", []):
            if snapshot.role is Role.SINK:
                self._see(snapshot, time.perf_counter())
        return reply

    def _see(self, now: worker.Snapshot, now_s: float) -> None:
        before = self._before
        if before is not None and _is_moving(before):
            self.moving_s += now_s - self._before_s
            self.moved_tokens += now.sent_tokens - before.sent_tokens
        if before is None or now.sent_tokens > before.sent_tokens:
            say("sent", sent_tokens=now.sent_tokens, base_tokens=now.base_tokens)
        self._before, self._before_s = now, now_s


def _is_moving(seen: worker.Snapshot) -> bool:
    """Whether the source has tokens that are not here yet, and nothing is waited for but them."""
    waits = seen.stall is not None or seen.state in TERMINAL
    return not waits and seen.available_tokens > seen.sent_tokens


def send(
    args: argparse.Namespace,
    layout: Layout,
    pieces: Iterable[tuple[int, Arrays, dict[str, int] | None]],
) -> None:
    """Fill windows with (first_token, arrays, aux) pieces as they come into being."""
    digests = Digests(plane.name for plane in layout.planes)
    total = None if args.total_late else args.tokens
    with (
        connect(args.runtime_dir, layout, "demo source") as client,
        client.send(args.transfer_id, total_tokens=total) as sending,
    ):
        for first, arrays, aux in pieces:
            tokens = len(next(iter(arrays.values())))
            sending.fill(first, arrays, aux=aux)
            digests.add(arrays)
            say("ready", ready_tokens=first + tokens)
        sending.finish()
        sending.wait(60)
    say("end", digests=digests.result())


def receive(args: argparse.Namespace, layout: Layout) -> tuple[Arrays, dict[str, Any], Receiving]:
    """Take window after window over; return all arrays, what to report, and the transfer."""
    parts: dict[str, list[NDArray[Any]]] = {plane.name: [] for plane in layout.planes}
    digests = Digests(parts)
    with (
        MeteredClient(args.runtime_dir, layout, "demo sink") as client,
        client.receive(args.transfer_id, source=args.source) as receiving,
    ):
        for number, window in enumerate(receiving, 1):
            taken = {name: window.gather(name) for name in parts}
            digests.add(taken)
            for name, array in taken.items():
                parts[name].append(array)
            _report(number, window, receiving)
    if args.harm is not None:
        digests = _harm(args.harm, parts)
    arrays = {name: np.concatenate(found) for name, found in parts.items()}
    report = {
        "digests": digests.result(),
        "bytes": sum(array.nbytes for array in arrays.values()),
        "seconds_transfer": client.moving_s,
        "bytes_timed": client.moved_tokens * layout.token_bytes,
        "total_tokens": receiving.total_tokens,
    }
    return arrays, report, receiving


def _report(number: int, window: WindowView, receiving: Receiving) -> None:
    say(
        "window",
        window=number,
        first_token=window.first_token,
        sent_tokens=window.first_token + window.tokens,
        total_tokens=receiving.total_tokens,
        runs=len(window.runs),
        resume=not receiving.ended,
    )


def _harm(how: str, parts: dict[str, list[NDArray[Any]]]) -> Digests:
    """Damage what arrived, so that a test can see the demo notice."""
    for found in parts.values():
        if how == "swap-windows":
            found[0], found[1] = found[1], found[0]
        else:
            found[0][len(found[0]) // 2] = 0
    digests = Digests(parts)
    for name, found in parts.items():
        for array in found:
            digests.add({name: array})
    return digests
