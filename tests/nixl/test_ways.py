"""Which transport two daemons agree on, and why."""

from pathlib import Path

import pytest

from kvferry_daemon.core.ways import choose
from kvferry_daemon.transports.nixl.ways import begin, ways
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import Encryption, Ways

FAST = Ways(wish="auto", nixl="1.5.1", fast=True)
SLOW = Ways(wish="auto", nixl="1.5.1", why="no RDMA device")
WITHOUT = Ways(wish="auto", why="not installed")
TCP = Ways(wish="tcp", why="transport is set to tcp")
NIXL = Ways(wish="nixl", nixl="1.5.1")
NEWER = Ways(wish="auto", nixl="1.6.0", fast=True)


@pytest.mark.parametrize(
    ("sink", "source", "transport", "why"),
    [
        (FAST, FAST, "nixl", "both ends have hardware for it"),
        (FAST, FAST.model_copy(update={"nixl": "1.5.9"}), "nixl", "both ends have hardware for it"),
        (FAST, SLOW, "tcp", "NIXL would not be faster, the source: no RDMA device"),
        (SLOW, FAST, "tcp", "NIXL would not be faster, the sink: no RDMA device"),
        (FAST, WITHOUT, "tcp", "the source has no NIXL: not installed"),
        (WITHOUT, FAST, "tcp", "the sink has no NIXL: not installed"),
        (FAST, TCP, "tcp", "the source is set to it"),
        (TCP, FAST, "tcp", "the sink is set to it"),
        (FAST, NEWER, "tcp", "the sink has NIXL 1.5.1, the source 1.6.0"),
        (NIXL, SLOW, "nixl", "the sink is set to it"),
        (SLOW, NIXL, "nixl", "the source is set to it"),
        (Ways(), Ways(), "tcp", "the sink is set to it"),
    ],
)
def test_the_best_that_both_have_is_chosen(
    sink: Ways, source: Ways, transport: str, why: str
) -> None:
    assert choose(sink, source) == (transport, why)


@pytest.mark.parametrize(
    ("sink", "source", "words"),
    [
        (NIXL, TCP, "the sink is set to nixl, but the source is set to tcp"),
        (TCP, NIXL, "the source is set to nixl, but the sink is set to tcp"),
        (NIXL, WITHOUT, "the sink is set to nixl, but the source has no NIXL: not installed"),
        (NIXL, NEWER, "the sink is set to nixl, but the sink has NIXL 1.5.1, the source 1.6.0"),
    ],
)
def test_what_one_insists_on_and_cannot_be_is_refused(sink: Ways, source: Ways, words: str) -> None:
    with pytest.raises(FerryError) as refused:
        choose(sink, source)
    assert refused.value.code is Code.TRANSPORT_UNAVAILABLE
    assert refused.value.message == words


@pytest.mark.parametrize("sink", ["off", "tls"])
@pytest.mark.parametrize("source", ["off", "tls"])
def test_ends_that_are_set_differently_do_not_talk_past_it(
    sink: Encryption, source: Encryption
) -> None:
    """Whatever else they wish: that is said first."""
    ends = [NIXL.model_copy(update={"payload_encryption": one}) for one in (sink, source)]
    if sink == source:
        assert choose(*ends)[0] == "nixl"
        return
    with pytest.raises(FerryError) as refused:
        choose(*ends)
    assert refused.value.code is Code.ENCRYPTION_DIFFERS
    assert refused.value.message == (
        f"payload_encryption: the sink has {sink}, the source has {source}"
    )


def test_an_end_that_encrypts_has_no_nixl() -> None:
    found, poller = begin("auto", encryption="tls")
    assert (found.wish, found.nixl, found.payload_encryption, poller) == ("tcp", "", "tls", None)


def test_an_end_with_tenants_has_no_nixl() -> None:
    """A peer that is offered one block can read the whole pool."""
    found, poller = begin("auto", by_tenant=True)
    assert (found.wish, found.why, poller) == ("tcp", "there are tenants", None)
    assert begin("auto", encryption="tls", by_tenant=True)[0].payload_encryption == "tls"


def test_an_end_that_is_set_to_tcp_does_not_look_for_nixl(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    assert ways("tcp", rdma_devices=tmp_path) == TCP


def test_nixl_is_fast_with_rdma_or_device_memory(tmp_path: Path) -> None:
    pytest.importorskip("nixl", reason="NIXL is not installed")
    assert not ways("auto", rdma_devices=tmp_path / "none").fast
    assert not ways("auto", rdma_devices=tmp_path).fast
    assert ways("auto", device_memory=True, rdma_devices=tmp_path).fast
    (tmp_path / "mlx5_0").mkdir()
    found = ways("auto", rdma_devices=tmp_path)
    assert (found.fast, found.why) == (True, "")
