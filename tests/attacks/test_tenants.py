"""Workers of one group that do not trust each other: one pool a user. Needs root, to be them."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from attacks.scene import NOBODY, OTHER, WAIT_S, started, stranger, without
from cli.processes import kvferry
from http_daemon import get
from kvferry_daemon.core.records import RECORDS, PoolRecord
from kvferry_daemon.keys import new_key, trust
from kvferry_daemon.ledger import rows_of
from kvferry_daemon.memory.opened import ACL, check_lists
from kvferry_proto import worker
from kvferry_proto.states import TERMINAL, Role, State
from live import BLOCK, LAYOUT, WINDOW, LiveDaemon, RawWorker

WORKERS, VICTIM = 47001, 65532
SHARED: dict[str, object] = {"worker_group": WORKERS}
POOL_BYTES = 4 * WINDOW // BLOCK * LAYOUT.block_bytes
APART = {**SHARED, "tenant": "uid", "tenant_budget_bytes": POOL_BYTES}
SECRET = os.urandom(32).hex()

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")


OPEN = {"Accept": "application/openmetrics-text;version=1.0.0"}  # with exemplars
AN_ID = "an-id-that-no-other-word-has"
PAGES = ("/", "/page.js", "/page.css", f"/explain?id={AN_ID}")


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of every daemon here: one with tenants does not start without. It trusts itself."""
    directory = tmp_path / "keys"
    trust(directory, "itself", new_key(directory))
    monkeypatch.setenv("KVFERRY_KEYS_DIR", str(directory))
    return directory


@contextmanager
def kept(daemon: LiveDaemon, transfer_id: str = "t") -> Iterator[None]:
    """A worker of another user, whose source has the secret ready in its pool."""
    with started(f"{VICTIM}:{WORKERS}", "keep", daemon.directory, transfer_id, SECRET) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "kept\n", one.communicate()
        yield


def source_of(daemon: LiveDaemon) -> worker.Snapshot:
    """The source's side of the transfer."""
    (found,) = (one.snapshot for one in daemon.transfers("t") if one.snapshot.role is Role.SOURCE)
    return found


def thief(daemon: LiveDaemon, act: str, *more: str) -> str:
    """What a worker of yet another user is told."""
    return stranger(OTHER, act, daemon.directory, *more, gid=WORKERS)


@pytest.mark.parametrize(
    ("defence", "flags", "told"),
    [
        (None, SHARED, "seen"),
        ("pools_are_the_groups", APART, "seen"),
        (None, APART, "not seen"),
    ],
)
def test_a_tenant_finds_nothing_of_another_ones_in_any_pool(
    place: Path, defence: str | None, flags: dict[str, object], told: str
) -> None:
    with without(defence)(place / "a", **flags) as daemon, kept(daemon):
        assert thief(daemon, "search", SECRET) == told
        if flags is APART:
            own = "pool pool.board"
            assert thief(daemon, "files") == ("pool pool pool.board pool.board" if defence else own)


@pytest.mark.parametrize(
    ("defence", "flags", "told"),
    [
        (None, SHARED, "seen"),
        ("tenants_meet", APART, "seen"),
        (None, APART, "not_your_transfer"),
    ],
)
def test_a_tenant_does_not_receive_what_another_one_sends(
    place: Path, defence: str | None, flags: dict[str, object], told: str
) -> None:
    with without(defence)(place / "a", **flags) as daemon, kept(daemon):
        assert thief(daemon, "receive", "t", SECRET).removeprefix("open\n") == told


@pytest.mark.parametrize(("defence", "told"), [("tenants_meet", "seen"), (None, "bad_address")])
def test_nor_by_the_address_of_its_own_daemon(place: Path, defence: str | None, told: str) -> None:
    with without(defence)(place / "a", **APART) as daemon, kept(daemon):
        address = daemon.address.replace("127.0.0.1", "localhost")
        assert thief(daemon, "receive", "t", SECRET, address) == f"open\n{told}"


@pytest.mark.parametrize(
    ("defence", "told"), [("tenants_meet", "seen"), (None, "not_your_transfer")]
)
def test_nor_does_it_by_coming_first(place: Path, defence: str | None, told: str) -> None:
    """And its end, which a sink tells its source, does the other one's transfer no harm."""
    with (
        without(defence)(place / "a", **APART) as daemon,
        started(f"{OTHER}:{WORKERS}", "receive", daemon.directory, "t", SECRET) as waiting,
    ):
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "open\n"
        with kept(daemon):
            assert waiting.communicate(timeout=WAIT_S)[0].strip() == told
            assert (source_of(daemon).state is State.SUCCESS) is (defence is not None)
            assert (source_of(daemon).state in TERMINAL) is (defence is not None)


def test_a_tenant_learns_no_ids_at_the_control_socket(place: Path) -> None:
    for name, flags, told in (("off", SHARED, "status"), ("uid", APART, "nothing")):
        with LiveDaemon(place / name, **flags) as daemon:
            assert thief(daemon, "status") == told
            assert stranger(0, "status", daemon.directory) == "status"


def test_any_user_of_the_machine_pulls_what_he_knows_the_id_of_unless_there_are_keys(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveDaemon(place / "keys it is", **APART) as daemon, kept(daemon):
        assert stranger(OTHER, "pull", place, daemon.address, "t") == "nothing"
    monkeypatch.delenv("KVFERRY_KEYS_DIR")
    with LiveDaemon(place / "clear", **SHARED) as daemon, kept(daemon):
        assert stranger(OTHER, "pull", place, daemon.address, "t") == f"{BLOCK} tokens"


def test_http_names_no_transfer_where_there_are_tenants(place: Path) -> None:
    """Whoever is on the machine reaches it."""
    for name, flags in (("off", SHARED), ("uid", APART)):
        with LiveDaemon(place / name, **flags, http_port=0) as daemon, kept(daemon, AN_ID):
            assert stranger(VICTIM, "receive", daemon.directory, AN_ID, SECRET, gid=WORKERS)
            found = [get(daemon, path) for path in PAGES]
            status, metrics = get(daemon, "/metrics", OPEN)
            assert status == 200
            assert (AN_ID in metrics) is (flags is SHARED)
            if flags is APART:
                found.append(get(daemon, "/events"))
                assert all("no tenant" in words for _, words in found)
            assert {status for status, _ in found} == {200 if flags is SHARED else 404}
            assert get(daemon, "/healthz")[0] == get(daemon, "/readyz")[0] == 200


def test_users_that_the_kernel_cannot_tell_apart_are_no_tenant(place: Path) -> None:
    """Of another user namespace all have this number."""
    for name, flags, told in (("off", SHARED, "welcome"), ("uid", APART, "nothing")):
        with LiveDaemon(place / name, **flags) as daemon:
            assert stranger(NOBODY, "hello", daemon.directory, gid=WORKERS) == told


def test_one_tenant_leaves_room_for_another(place: Path) -> None:
    """The first pool takes what it may have, which is all there is where all are one."""
    budget = {"budget_bytes": 2 * POOL_BYTES, "pool_tokens": 1 << 20}
    for name, more, told in (("all", {}, "pool_refused"), ("some", APART, "welcome")):
        flags = {**APART, "tenant_budget_bytes": 2 * POOL_BYTES, **budget, **more}
        with LiveDaemon(place / name, **flags) as daemon, kept(daemon):
            assert thief(daemon, "hello") == told


def test_a_next_life_keeps_tenants_apart_and_goes_on_with_their_transfers(place: Path) -> None:
    with (
        LiveDaemon(place / "a", **APART) as daemon,
        kept(daemon),
        RawWorker(daemon.directory) as raw,
    ):
        assert raw.welcome is not None
        own = Path(raw.welcome.pool.path)  # of the daemon's own user
        raw.snapshot(worker.Send(transfer_id="own"))
        daemon.process.kill()
        with daemon.again() as again:
            assert stat.S_IMODE(own.stat().st_mode) == 0o600
            assert source_of(again).state not in TERMINAL
            (path,) = (again.directory / "pools").glob(f"*-uid{VICTIM}")
            assert os.getxattr(path, ACL)
            assert thief(again, "search", SECRET) == "not seen"
            assert thief(again, "receive", "t", SECRET) == "not_your_transfer"


def test_a_tenant_that_cuts_its_pool_loses_its_own_alone_and_is_named(place: Path) -> None:
    with (
        LiveDaemon(place / "a", **APART) as daemon,
        kept(daemon),
        RawWorker(daemon.directory) as raw,
    ):
        raw.snapshot(worker.Send(transfer_id="own"))
        (pool,) = (daemon.directory / "pools").glob(f"*-uid{VICTIM}")
        assert stranger(VICTIM, "cut", pool, gid=WORKERS) == "cut"
        daemon.process.kill()
        with daemon.again() as again:
            again.wait_for_log(f"its file has 0 bytes, not {POOL_BYTES}; uid {VICTIM} may write it")
            (own,) = again.transfers("own")
            assert own.snapshot.state not in TERMINAL
            error = source_of(again).error
            assert error is not None
            assert error.code == "pool_lost"


@pytest.mark.parametrize(("before", "after"), [(SHARED, APART), (APART, SHARED)])
def test_a_life_that_tells_them_apart_otherwise_goes_on_with_nothing(
    place: Path, before: dict[str, object], after: dict[str, object]
) -> None:
    with LiveDaemon(place / "a", **before) as daemon, kept(daemon):
        daemon.process.kill()
        daemon.process.wait()
        daemon.stop()
        with LiveDaemon(place / "a", **after) as again:
            assert again.transfers("t") == []
            assert [one for one in (again.directory / "pools").iterdir() if not one.suffix] == []
            again.wait_for_log("tenant is")


def test_a_pool_of_a_tenant_that_there_cannot_be_does_not_keep_the_daemon_down(
    place: Path,
) -> None:
    """The ledger's row of it ended the daemon's start, each time anew."""
    with LiveDaemon(place / "a", **APART) as daemon, kept(daemon):
        daemon.process.kill()
        daemon.process.wait()
        rows = dict(rows_of(daemon.directory / "ledger.db"))
        [pool] = [one for one in map(RECORDS.decode, rows.values()) if isinstance(one, PoolRecord)]
        wrong = pool.model_copy(update={"pool_id": f"{pool.layout.digest.hex()}-foo"})
        files = daemon.directory / "pools"
        (files / pool.pool_id).rename(files / wrong.pool_id)
        db = sqlite3.connect(daemon.directory / "ledger.db")
        with db:
            db.execute("DELETE FROM rows WHERE name != 'daemon'")
            row = (f"pool:{wrong.pool_id}", RECORDS.encode(wrong))
            db.execute("INSERT INTO rows VALUES (?, ?)", row)
        db.close()
        daemon.stop()
        with LiveDaemon(place / "a", **APART) as again:
            again.wait_for_log("is of no tenant that there can be")
            assert (again.directory / "ledger.bad.db").exists()
            assert thief(again, "map_all") == "16 blocks"


@pytest.mark.parametrize(
    ("defence", "sessions", "told"),
    [("tenants_have_any_sessions", 8, "resource_exhausted"), (None, 2, "welcome")],
)
def test_a_tenant_has_so_many_sessions_and_others_still_join(
    place: Path, defence: str | None, sessions: int, told: str
) -> None:
    with (
        without(defence)(place / "a", workers_max=4 * 2, **APART) as daemon,
        started(f"{VICTIM}:{WORKERS}", "crowd", daemon.directory, "12") as hog,
    ):
        assert hog.stdout is not None
        assert hog.stdout.readline() == f"{sessions} welcome\n"
        assert thief(daemon, "hello") == told


def test_a_tenant_is_served_in_its_own_pool_as_ever(place: Path) -> None:
    with LiveDaemon(place / "a", **APART) as daemon:
        assert thief(daemon, "map_all") == "16 blocks"
        with kept(daemon):
            found = stranger(VICTIM, "receive", daemon.directory, "t", SECRET, gid=WORKERS)
            assert found == "open\nseen"
        with RawWorker(daemon.directory) as raw:  # of the daemon's own user
            assert raw.welcome is not None
            facts = Path(raw.welcome.pool.path).stat()
            assert stat.S_IMODE(facts.st_mode) == 0o600
            raw.snapshot(worker.Send(transfer_id="own"))


def test_tenants_need_a_group_a_budget_and_keys(
    place: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--runtime-dir", place / "a", "--tenant", "uid")
    monkeypatch.delenv("KVFERRY_KEYS_DIR")
    assert "worker_group" in kvferry("config", "check", *asked).stderr
    grouped = (*asked, "--worker-group", WORKERS)
    assert "tenant_budget_bytes" in kvferry("config", "check", *grouped).stderr
    whole = (*grouped, "--tenant-budget-bytes", "1MiB")
    shared = (*whole, "--operator-group", WORKERS)
    assert "operator_group" in kvferry("config", "check", *shared).stderr
    assert "set keys_dir" in kvferry("config", "check", *whole).stderr
    keyed = (*whole, "--keys-dir", keys)
    assert "transport to tcp" in kvferry("config", "check", *keyed, "--transport=nixl").stderr
    assert kvferry("config", "check", *keyed).returncode == 0


def test_a_directory_that_keeps_no_access_lists_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setxattr(*_args: object) -> None:
        raise OSError(95, "Operation not supported")

    check_lists(place)
    assert list(place.iterdir()) == []
    monkeypatch.setattr(os, "setxattr", setxattr)
    with pytest.raises(OSError, match="put runtime_dir on a tmpfs"):
        check_lists(place)
    assert list(place.iterdir()) == []
