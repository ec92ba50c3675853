"""A pool in a GPU's memory: opened by a worker, and handed over within its daemon."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.figures import absent, spread
from bench.payload import llama
from bench.served import ServedDaemon
from bench.source_worker import batched, has_succeeded, let_go, wait_all
from kvferry_client import Client, Role, connect
from kvferry_proto import worker

DEVICE = "cuda:0"
ROUNDS = 11
TOKENS = 8192


def measure() -> dict[str, Any]:
    """On the first CUDA device; without one, the reason."""
    import torch  # not above: the other parts do without, and it takes seconds

    return _measure() if torch.cuda.is_available() else absent("no CUDA device")


def _measure() -> dict[str, Any]:
    import torch

    layout = llama()
    total_bytes = TOKENS * layout.token_bytes
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        daemon = stack.enter_context(
            ServedDaemon(
                Path(root) / "daemon",
                device=DEVICE,
                pool_tokens=2 * TOKENS,
                window_tokens=TOKENS,
                budget_bytes=2 * total_bytes + (64 << 20),
            )
        )
        opened_s = []
        for _ in range(ROUNDS + 1):  # the first one makes the pool, and wakes CUDA
            begun = time.monotonic()
            with connect(daemon.directory, layout, "opens"):
                opened_s.append(time.monotonic() - begun)
        source, sink = (
            stack.enter_context(connect(daemon.directory, layout, name))
            for name in ("source", "sink")
        )
        handed_s = [_hand_over(source, sink, f"bench-{n}") for n in range(ROUNDS + 1)]
        counters = daemon.status().counters
    return {
        "device": torch.cuda.get_device_name(DEVICE),
        "rounds": ROUNDS,
        "bytes_verified": True,
        "total_bytes": total_bytes,
        "open_ms": spread(one * 1e3 for one in opened_s[1:]),
        "handoff_us": spread(one * 1e6 for one in handed_s[1:]),
        "handoff_bytes_copied": counters.get("bytes_copied", 0) + counters.get("bytes_received", 0),
    }


def _hand_over(source: Client, sink: Client, name: str) -> float:
    """From `receive` until the sink worker sees Success; seconds."""
    import torch

    sent = batched(
        source, [worker.Send(transfer_id=name, total_tokens=TOKENS, window_tokens=TOKENS)]
    )
    sent = wait_all(source, sent, lambda seen: seen.allocated_tokens == TOKENS)
    blocks = torch.tensor([first + at for first, count in sent[0].runs for at in range(count)])
    theirs = source.pool.torch_blocks()
    noise = torch.randint_like(theirs[: len(blocks)], 256)
    theirs[blocks.to(theirs.device)] = noise
    torch.cuda.synchronize()
    batched(source, [worker.Ready(transfer_id=name, ready_tokens=TOKENS)])
    begun = time.monotonic()
    receiving = sink.receive(name, window_tokens=TOKENS)
    receiving.wait()
    took_s = time.monotonic() - begun
    assert receiving.snapshot.runs == sent[0].runs, "the blocks are not the source's"
    ours = sink.pool.torch_blocks()
    assert torch.equal(ours[blocks.to(ours.device)], noise), "other bytes than were sent"
    receiving.release()
    wait_all(source, sent, has_succeeded)
    let_go(source, Role.SOURCE, [name])
    return took_s
