"""Answers that do not fit into one frame, over the real sockets: split, cut short or refused."""

from collections.abc import Iterator

import pytest

from kvferry_daemon.operator import ask
from kvferry_proto import control, peer, worker
from kvferry_proto.fields import AUX_BYTES_MAX
from kvferry_proto.layout import Dtype, Layout, Plane
from kvferry_proto.states import Role
from live import BLOCK, LiveDaemon, RawPeer, RawWorker

MANY = 12  # transfers whose aux values fill a few frames
WITH_AUX = Layout(
    planes=(Plane(name="kv", dtype=Dtype.UINT8),),
    aux=tuple(f"big{index}" for index in range(5)),
    block_size_tokens=BLOCK,
)


@pytest.fixture
def source(daemon: LiveDaemon) -> Iterator[RawWorker]:
    """A worker with many sources, each with as large aux values as may be."""
    aux: dict[str, int | float | str | bytes] = {
        name: bytes(AUX_BYTES_MAX // len(WITH_AUX.aux)) for name in WITH_AUX.aux
    }
    with RawWorker(daemon.directory, WITH_AUX) as one:
        for index in range(MANY):
            one.snapshot(worker.Send(transfer_id=f"t{index}", window_tokens=BLOCK, aux=aux))
        yield one


def test_progresses_that_do_not_fit_one_frame_come_in_several(
    raw: RawPeer, source: RawWorker
) -> None:
    pulls = [raw.a_pull(transfer_id=f"t{index}", handle=index, layout_digest=WITH_AUX.digest)
             for index in range(MANY)]  # fmt: skip
    answer = raw.say(peer.Pulls(pulls=pulls, **raw.boots()))
    seen = [one.transfer_id for one in answer.progresses]
    while len(seen) < MANY:
        answer = raw.next()
        assert isinstance(answer, peer.Progresses), answer
        seen += [one.transfer_id for one in answer.progresses]
        assert all(len(one.aux or ()) == len(WITH_AUX.aux) for one in answer.progresses)
    assert seen == [f"t{index}" for index in range(MANY)]


def test_operators_get_as_many_transfers_as_fit(daemon: LiveDaemon, source: RawWorker) -> None:
    answer = ask(daemon.directory, control.GetTransfers())
    assert isinstance(answer, control.Transfers)
    assert 0 < len(answer.transfers) < MANY
    assert len(answer.transfers) + answer.more == MANY
    assert answer.transfers[-1].snapshot.transfer_id == f"t{MANY - 1}"


def test_a_poll_for_too_much_is_refused_and_a_smaller_one_answered(source: RawWorker) -> None:
    watched = [worker.Watched(role=Role.SOURCE, transfer_id=f"t{index}") for index in range(MANY)]
    assert source.code(worker.Poll(transfers=watched)) == "resource_exhausted"
    reply = source.call(worker.Poll(transfers=watched[:2]))
    assert [one.transfer_id for one in reply.transfers] == ["t0", "t1"]


def test_aux_values_that_could_never_travel_are_refused(source: RawWorker) -> None:
    too_much = {name: bytes(AUX_BYTES_MAX // 4) for name in WITH_AUX.aux}
    reply = source.fields(kind="send", call=77, transfer_id="x", aux=too_much)
    assert isinstance(reply, worker.Failure)
    assert reply.error.code == "bad_message"
    assert f"over {AUX_BYTES_MAX} in all" in reply.error.message
