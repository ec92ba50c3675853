"""Aux values, such as a first token, are payload: who must not have a payload hears nothing of them."""

from pathlib import Path

import pytest

from attacks.scene import without
from kvferry_daemon.core.aux_books import OF_ONE_MAX, bytes_of
from kvferry_proto import peer, worker
from kvferry_proto.errors import AGAIN_S
from kvferry_proto.fields import AUX_BYTES_MAX
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role, State
from live import BLOCK, BOOT_ID, LiveDaemon, RawPeer, RawWorker

WITH_AUX = Layout(
    planes=(Plane(name="kv", dtype=Dtype.UINT8),), aux=("first",), block_size_tokens=BLOCK
)
AUX: dict[str, int | float | str | bytes] = {"first": b"payload-that-nobody-may-see"}
TOTAL = 2 * BLOCK
THIEF = "cd" * 16
LARGE = WITH_AUX.model_copy(update={"aux": ("a", "b", "c", "d")})
LARGE_AUX: dict[str, int | float | str | bytes] = {
    name: bytes(AUX_BYTES_MAX // 4) for name in LARGE.aux
}
TIMES = 256  # 64 MiB of these
LARGE_MIB = 48


def a_peer(daemon: LiveDaemon, boot_id: str = BOOT_ID) -> RawPeer:
    """A daemon that has said hello."""
    one = RawPeer(daemon.address)
    one.source = one.say(peer.PeerHello(boot_id=boot_id, daemon_id=boot_id, life=1)).boot_id
    return one


def pull(one: RawPeer, boot_id: str = BOOT_ID, **fields: object) -> peer.Progress:
    """What a pull is answered."""
    asked = one.a_pull(**{"layout_digest": WITH_AUX.digest, **fields})
    pulls = peer.Pulls(pulls=[asked], source_boot_id=one.source, sink_boot_id=boot_id)
    answer = one.say(pulls)
    assert isinstance(answer, peer.Progresses), answer
    return answer.progresses[0]


def offer(source: RawWorker, transfer_id: str = "t", start: int = 0) -> None:
    """Open a source that has told all but its last block."""
    source.snapshot(
        worker.Send(
            transfer_id=transfer_id, start_tokens=start, total_tokens=start + TOTAL, aux=AUX
        )
    )
    end = start + BLOCK
    source.wait_for(Role.SOURCE, lambda s: s.base_tokens + s.allocated_tokens >= end, transfer_id)
    source.snapshot(worker.Ready(transfer_id=transfer_id, ready_tokens=end))


@pytest.mark.parametrize("defence", ["refused_sinks_hear_all", None])
def test_a_sink_that_is_refused_hears_nothing_of_the_payload(
    tmp_path: Path, defence: str | None
) -> None:
    with (
        without(defence)(tmp_path / "a") as daemon,
        RawWorker(daemon.directory, WITH_AUX) as source,
    ):
        honest, thief = a_peer(daemon), a_peer(daemon, THIEF)
        offer(source)
        offer(source, "prefix", start=BLOCK)
        assert pull(honest).aux == AUX
        taken = pull(thief, THIEF)
        mismatch = pull(thief, THIEF, transfer_id="prefix")
        assert taken.error is not None
        assert mismatch.error is not None
        assert (taken.error.code, mismatch.error.code) == ("sink_taken", "start_mismatch")
        done = peer.Done(transfer_id="t", attempt=0, state=State.SUCCESS, **honest.boots())
        assert honest.say(done).kind == "done_noted"
        late = pull(thief, THIEF)
        assert late.state is State.SUCCESS
        for told in (taken, mismatch, late):
            heard = (told.aux, told.available_tokens > 0, told.total_tokens is not None)
            assert heard == ((AUX, True, True) if defence else (None, False, False))
        source.snapshot(worker.Release(transfer_id="t", role=Role.SOURCE))
        forgotten = pull(thief, THIEF)
        assert (forgotten.state, forgotten.total_tokens) == (State.SUCCESS, None)
        assert forgotten.available_tokens == 0
        honest.close()
        thief.close()


def kept_mib(daemon: LiveDaemon) -> tuple[int, int]:
    """Memory of its own, and the ledger with its log."""
    fields = Path(f"/proc/{daemon.process.pid}/status").read_text().split()
    ledger = sum(path.stat().st_size for path in daemon.directory.glob("ledger.db*"))
    return int(fields[fields.index("RssAnon:") + 1]) >> 10, ledger >> 20


@pytest.mark.parametrize("defence", ["ended_ones_keep_their_aux", None])
def test_transfers_that_are_over_keep_no_aux_values(tmp_path: Path, defence: str | None) -> None:
    """Opened, given up and released in a loop, they are remembered for ten minutes."""
    with without(defence)(tmp_path / "a") as daemon, RawWorker(daemon.directory, LARGE) as one:
        before = kept_mib(daemon)
        for number in range(TIMES):
            name = f"t{number}"
            opened = one.call(worker.Send(transfer_id=name, aux=LARGE_AUX))
            assert opened.kind == "snapshots"
            one.call(worker.Abort(transfer_id=name, role=Role.SOURCE))
            one.call(worker.Release(transfer_id=name, role=Role.SOURCE))
        grown = [now - was for now, was in zip(kept_mib(daemon), before, strict=True)]
        assert (min(grown) >= LARGE_MIB) is (defence is not None), grown
        assert (max(grown) < LARGE_MIB) is (defence is None), grown
        assert one.poll(Role.SOURCE, "t0").state is State.FAILED


@pytest.mark.parametrize("defence", ["aux_is_not_counted", None])
def test_a_worker_keeps_so_many_aux_values_and_no_more(tmp_path: Path, defence: str | None) -> None:
    most = OF_ONE_MAX // bytes_of(LARGE_AUX)
    with (
        without(defence)(tmp_path / "a", lost_s=60) as daemon,
        RawWorker(daemon.directory, LARGE) as one,
    ):
        sends = [worker.Send(transfer_id=f"t{n}", aux=LARGE_AUX) for n in range(most + 2)]
        replies = [one.call(send) for send in sends]
        refused = [reply.error for reply in replies if isinstance(reply, worker.Failure)]
        if defence is not None:
            assert not refused
            return
        assert [error.code for error in refused] == ["resource_exhausted"] * 2
        assert refused[0].retry_after_s == AGAIN_S
        assert daemon.status().counters["refused_resource_exhausted"] == 2
        with RawWorker(daemon.directory, LARGE) as other:
            other.snapshot(worker.Send(transfer_id="other", aux=LARGE_AUX))
        one.snapshot(worker.Send(transfer_id="small", aux=dict.fromkeys(LARGE.aux, 7)))
        later = worker.Send(transfer_id="later")
        one.snapshot(later)
        ready = worker.Ready(transfer_id="later", ready_tokens=0, aux=LARGE_AUX)
        assert one.code(ready) == "resource_exhausted"
        one.snapshot(worker.Abort(transfer_id="t0", role=Role.SOURCE))
        one.snapshot(worker.Release(transfer_id="t0", role=Role.SOURCE))
        assert one.snapshot(ready).aux == LARGE_AUX
        assert one.code(sends[-1]) == "resource_exhausted"
