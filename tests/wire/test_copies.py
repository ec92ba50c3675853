"""A real daemon whose sink gives up while copies wait for their thread."""

from pathlib import Path

from kvferry_proto import worker
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State
from live import LiveDaemon, RawWorker

TOKENS, PIECE = 512, 16  # a block of 16 tokens has 1 MiB, and is a chunk


def test_copies_that_wait_for_their_thread_are_taken_back(tmp_path: Path) -> None:
    planes = (Plane(name="kv", dtype=Dtype.UINT8, shape=(1 << 16,)),)
    flags = {"window_tokens": TOKENS, "pool_tokens": 2 * TOKENS}
    with (
        LiveDaemon(tmp_path / "d", **flags) as daemon,
        RawWorker(daemon.directory, Layout(planes=planes, block_size_tokens=2 * PIECE)) as source,
        RawWorker(daemon.directory, Layout(planes=planes, block_size_tokens=PIECE)) as sink,
    ):
        source.snapshot(worker.Send(transfer_id="t", total_tokens=TOKENS))
        source.wait_for(Role.SOURCE, lambda seen: seen.allocated_tokens == TOKENS)
        source.snapshot(worker.Ready(transfer_id="t", ready_tokens=TOKENS, total_tokens=TOKENS))
        calls: list[worker.Verb] = [
            worker.Receive(transfer_id="t"),
            worker.Abort(transfer_id="t", role=Role.SINK),
        ]
        replies = sink.call(worker.Batch(calls=calls)).replies  # in one turn: at once
        assert replies[1].transfers[0].state is State.FAILED
        sink.snapshot(worker.Release(transfer_id="t", role=Role.SINK))
        source.snapshot(worker.Release(transfer_id="t", role=Role.SOURCE))
        counters = daemon.wait_until_free().counters
        chunks = TOKENS // PIECE
        assert counters["chunks_missed"] + counters.get("chunks_copied", 0) == chunks
        assert counters["chunks_missed"] > chunks // 2
        assert daemon.transfers("t")[0].snapshot.error is not None
        assert "Traceback" not in daemon.log()
