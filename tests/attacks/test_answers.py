"""Small questions with huge answers: what does not fit into a frame is refused before it is made."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from attacks.scene import without
from kvferry_proto import peer, worker
from kvferry_proto.fields import AUX_BYTES_MAX
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role
from live import BLOCK, BOOT_ID, LiveDaemon, RawPeer, RawWorker

VALUES = 4
WITH_AUX = Layout(
    planes=(Plane(name="kv", dtype=Dtype.UINT8),),
    aux=tuple(f"big{number}" for number in range(VALUES)),
    block_size_tokens=BLOCK,
)
AUX: dict[str, int | float | str | bytes] = {
    name: bytes(AUX_BYTES_MAX // VALUES) for name in WITH_AUX.aux
}
TIMES = 512  # 128 MiB of aux values
SEND = worker.Send(transfer_id="t", aux=AUX)
GROWN_MIB = 48
defences = pytest.mark.parametrize("defence", ["answers_are_made_whole", None])
PULLS = 32


def most_mib(daemon: LiveDaemon) -> int:
    """The most memory that it has had so far."""
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("no VmHWM")


@contextmanager
def asked(directory: Path, defence: str | None) -> Iterator[RawWorker]:
    """A worker with one transfer; its daemon's memory stays small, or grows without a defence."""
    with (
        without(defence)(directory / "a", lost_s=60) as daemon,
        RawWorker(daemon.directory, WITH_AUX) as one,
    ):
        one.snapshot(SEND)
        before = most_mib(daemon)
        yield one
        assert (most_mib(daemon) - before > GROWN_MIB) is (defence is not None)


@defences
def test_a_transfer_that_is_asked_for_often_is_answered_once(
    tmp_path: Path, defence: str | None
) -> None:
    with asked(tmp_path, defence) as one:
        watched = [worker.Watched(role=Role.SOURCE, transfer_id="t")] * TIMES
        reply = one.call(worker.Poll(transfers=watched))
        if defence is None:
            assert [seen.transfer_id for seen in reply.transfers] == ["t"]


@defences
def test_a_batch_is_answered_as_far_as_a_frame_goes(tmp_path: Path, defence: str | None) -> None:
    with asked(tmp_path, defence) as one:
        again: list[worker.Verb] = [worker.Ready(transfer_id="t", ready_tokens=0)]
        last = worker.Heartbeat()
        reply = one.call(worker.Batch(calls=[*again * (worker.BATCH_MAX - 1), last]))
        if defence is None:
            kinds = [each.kind for each in reply.replies]
            assert kinds == ["snapshots"] * 3 + ["failure"] * (worker.BATCH_MAX - 4) + ["snapshots"]
            assert reply.replies[3].error.code == "resource_exhausted"
            assert "ask for less at once" in reply.replies[3].error.message


@pytest.mark.parametrize("defence", ["every_pull_is_answered", None])
def test_pulls_of_one_transfer_get_one_answer(tmp_path: Path, defence: str | None) -> None:
    with (
        without(defence)(tmp_path / "a", lost_s=60) as daemon,
        RawWorker(daemon.directory, WITH_AUX) as source,
    ):
        source.snapshot(SEND)
        one = RawPeer(daemon.address)
        hello = peer.PeerHello(boot_id=BOOT_ID, daemon_id=BOOT_ID, life=1)
        one.source = one.say(hello).boot_id
        pulls = [one.a_pull(number=n, layout_digest=WITH_AUX.digest) for n in range(PULLS)]
        one.socket.send(peer.MESSAGES.encode(peer.Pulls(pulls=pulls, **one.boots())))
        one.socket.send(peer.MESSAGES.encode(peer.Ping(**one.boots())))
        told: list[peer.Progress] = []
        while isinstance(answer := one.next(), peer.Progresses):
            assert answer.before == len(told)
            told += answer.progresses
        assert [each.number for each in told] == (list(range(PULLS)) if defence else [PULLS - 1])
        assert answer.news == len(told)
        assert all(each.aux == AUX for each in told)
        one.close()
