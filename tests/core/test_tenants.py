"""Tenants in the core: whose pool a worker is shown, in a GPU's memory too."""

import hashlib
from dataclasses import replace

import pytest

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.tenants import Tenancy, pool_id_of, tenant_in, tenant_of, uid_in
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.states import Role, State
from world import Machine, World, layout

ONE, AGAIN, OTHER = b"one worker", b"another of its user", b"another user's"
USER, USER_AGAIN, ANOTHER_USER = "1000:9:1", "1000:9:2", "1001:9:3"
CALL = worker.Send(transfer_id="t")


class Gpu(World):
    """Pools are in a device, and each has a handle of its own."""

    def __init__(self, tenancy: Tenancy) -> None:
        super().__init__()
        node = self.machines["a"].node
        node.settings = replace(
            node.settings, device="cuda:0", tenancy=tenancy, tenant_budget_bytes=1 << 20
        )

    def _perform(self, name: str, me: Machine, effect: out.NodeEffect) -> list[out.NodeEvent]:
        if not isinstance(effect, out.MakePool):
            return super()._perform(name, me, effect)
        handle = hashlib.sha512(effect.pool_id.encode()).digest()
        memory = worker.DeviceMemory(device="cuda:0", uuid=b"u" * 16, handle=handle)
        return [out.PoolMade(effect.pool_id, f"/pools/{effect.pool_id}", memory)]

    def pools(self) -> list[worker.PoolInfo]:
        """What two workers of one user and one of another are shown."""
        who = ((ONE, USER), (AGAIN, USER_AGAIN), (OTHER, ANOTHER_USER))
        return [self.hello("a", route, user=user).pool for route, user in who]


@pytest.mark.parametrize(("tenancy", "is_shared"), [("off", True), ("uid", False)])
def test_a_tenant_is_shown_no_handle_and_no_board_of_another(
    tenancy: Tenancy, is_shared: bool
) -> None:
    one, again, other = Gpu(tenancy).pools()
    assert one.device is not None
    assert other.device is not None
    assert again == one
    assert (other.device.handle == one.device.handle) is is_shared
    assert (other.board == one.board) is is_shared


@pytest.mark.parametrize(("tenancy", "is_shared"), [("off", True), ("uid", False)])
def test_a_pool_that_broke_is_lost_to_its_tenant_alone(tenancy: Tenancy, is_shared: bool) -> None:
    world = Gpu(tenancy)
    world.pools()
    pool_id = pool_id_of(layout(), tenant_of(USER, tenancy))
    world.feed("a", out.PoolBroken(pool_id, "it broke", usable=True))
    failed = world.call("a", ONE, CALL, USER)
    assert failed.error.code == Code.DEVICE_FAILED
    other = world.call("a", OTHER, CALL, ANOTHER_USER)
    assert isinstance(other, worker.Failure) is is_shared


def test_a_pools_name_says_whose_it_is() -> None:
    shared = pool_id_of(layout(), tenant_of(USER, "off"))
    own = pool_id_of(layout(), tenant_of(USER, "uid"))
    assert (tenant_in(shared), uid_in(shared)) == ("", None)
    assert (tenant_in(own), uid_in(own)) == (f"uid{USER.partition(':')[0]}", 1000)
    assert own.startswith(shared)


def tenants() -> World:
    """A worker of each of two users at one daemon."""
    world = World()
    node = world.machines["a"].node
    node.settings = replace(node.settings, tenancy="uid", tenant_budget_bytes=1 << 20)
    world.hello("a", ONE, user=USER)
    world.hello("a", OTHER, user=ANOTHER_USER)
    return world


def test_the_end_of_a_sink_that_came_first_does_another_tenants_source_no_harm() -> None:
    """A source found its id ended already, in the words of whoever had guessed it."""
    world = tenants()
    world.call("a", OTHER, worker.Receive(transfer_id="t"), ANOTHER_USER)
    world.call("a", OTHER, worker.Abort(transfer_id="t", role=Role.SINK), ANOTHER_USER)
    (opened,) = world.call("a", ONE, CALL, USER).transfers
    assert opened.state is State.BOOTSTRAPPING


def test_a_tenant_whose_worker_has_left_is_ended_by_nobody_elses_attempt() -> None:
    """All was ready, so the payload outlives its worker; a higher attempt took it from its sink."""
    world = tenants()
    (opened,) = world.call("a", ONE, worker.Send(transfer_id="t", total_tokens=4), USER).transfers
    world.fill("a", opened, 4)
    world.call("a", ONE, worker.Ready(transfer_id="t", ready_tokens=4, total_tokens=4), USER)
    (session,) = (s.secret for s in world.machines["a"].node.sessions.values() if s.user == USER)
    world.feed("a", out.LockDropped(session))
    (source,) = world.machines["a"].node.transfers.values()
    assert not source.ended
    again = world.call("a", OTHER, worker.Send(transfer_id="t", attempt=1), ANOTHER_USER)
    assert again.error.code == Code.NOT_YOUR_TRANSFER
    assert not source.ended


@pytest.mark.parametrize(
    "tenant", ["foo", "uid", "uid-1", "uid1x", "uid 1", "uid01", f"uid{1 << 32}"]
)
def test_a_pool_of_a_tenant_that_there_cannot_be_has_no_user(tenant: str) -> None:
    with pytest.raises(ValueError, match="no tenant that there can be"):
        uid_in(f"{'0' * 32}-{tenant}")
