"""A daemon that lets a group's processes in: what they may, and what they may not. Needs root."""

import os
import socket
import stat
import time
from pathlib import Path

import pytest

from attacks.scene import NOBODY, OTHER, open_to_all, started, stranger, without
from cli.processes import kvferry
from kvferry_daemon.access import Access
from kvferry_daemon.links.liveness import Liveness
from kvferry_daemon.runtime_dir import DirectoryRefused, RuntimeDir
from kvferry_proto import worker
from kvferry_proto.states import Role, State
from live import WAIT_S, LiveDaemon, RawWorker

WORKERS, OPERATORS = 47001, 47002
ACTS = ("hello", "status", "drain")
BOTH = {"worker_group": WORKERS, "operator_group": OPERATORS}

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")


def modes(directory: Path) -> dict[str, tuple[int, int]]:
    """Mode and group of everything, by name; pools are called `pool`."""
    paths = [directory, *directory.glob("*"), *directory.glob("pools/*")]
    found = {}
    for path in paths:
        facts = path.lstat()
        name = "." if path == directory else path.name
        name = f"pool{path.suffix}" if path.parent.name == "pools" else name
        found[name] = (stat.S_IMODE(facts.st_mode), facts.st_gid)
    return {name: seen for name, seen in found.items() if not name.startswith("ledger")}


def test_everything_is_private_without_a_group(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as daemon, RawWorker(daemon.directory):
        assert {mode & 0o077 for mode, _ in modes(daemon.directory).values()} == {0}


def test_no_file_is_opened_by_who_may_not(place: Path) -> None:
    """Of another user, and of a worker of the group."""
    everything = {"daemon.lock", "ledger.db", "pool", "pool.board"}
    for defence in ("files_are_open", None):
        for flags, group, may in (({}, NOBODY, ""), (BOTH, WORKERS, "pool pool.board")):
            where = place / f"{defence} {group}"
            with without(defence)(where, **flags) as daemon, RawWorker(daemon.directory):
                found = stranger(NOBODY, "files", daemon.directory, gid=group)
                assert everything <= set(found.split()) if defence else found == may


def test_a_group_reaches_sockets_and_pools_and_nothing_else(place: Path) -> None:
    with LiveDaemon(place / "a", **BOTH) as daemon, RawWorker(daemon.directory):
        seen = modes(daemon.directory)
        own = seen.pop("daemon.lock")
        assert own[0] == 0o600
        assert seen == {
            ".": (0o750, WORKERS),
            "pools": (0o2750, WORKERS),
            "workers": (0o3730, WORKERS),
            "worker.sock": (0o660, WORKERS),
            "control.sock": (0o660, WORKERS),
            "pool": (0o660, WORKERS),
            "pool.board": (0o640, WORKERS),
        }
        for path in daemon.directory.glob("ledger*"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert stranger(NOBODY, "files", daemon.directory, gid=WORKERS) == "pool pool.board"


def test_who_may_work_read_and_operate(place: Path) -> None:
    """The kernel's word for a process's own group decides, also where the modes are wrong."""
    with LiveDaemon(place / "a", **BOTH) as daemon:
        open_to_all(daemon)
        told = {
            group: [stranger(NOBODY, act, daemon.directory, gid=group) for act in ACTS]
            for group in (NOBODY, WORKERS, OPERATORS)
        }
        assert told == {
            NOBODY: ["nothing", "nothing", "nothing"],
            WORKERS: ["welcome", "status", "control_denied"],
            OPERATORS: ["nothing", "status", "draining"],
        }
        assert daemon.status().counters["operators_refused"] == 1
        daemon.wait_for_log(f"{NOBODY}:{WORKERS}")


def test_a_worker_of_the_group_maps_its_pool_and_its_board(place: Path) -> None:
    with LiveDaemon(place / "a", **BOTH) as daemon:
        assert stranger(NOBODY, "map_all", daemon.directory, gid=WORKERS) == "16 blocks"
        daemon.wait_for_workers(0)
        until_s = time.monotonic() + WAIT_S
        while any((daemon.directory / "workers").iterdir()):  # after the ledger's commit
            assert time.monotonic() < until_s
            time.sleep(0.02)


def test_a_worker_does_not_drain_its_daemon(place: Path) -> None:
    for defence, told in (("anybody_operates", "draining"), (None, "control_denied")):
        with without(defence)(place / str(defence), worker_group=WORKERS) as daemon:
            assert stranger(NOBODY, "drain", daemon.directory, gid=WORKERS) == told
            assert daemon.status().draining is (defence is not None)
            assert stranger(0, "drain", daemon.directory) == "draining"


def test_a_worker_ends_no_transfer_and_silences_no_log_by_the_operators_socket(place: Path) -> None:
    for defence in ("anybody_operates", None):
        with (
            without(defence)(place / str(defence), worker_group=WORKERS, lost_s=60) as daemon,
            RawWorker(daemon.directory) as victim,
        ):
            victim.snapshot(worker.Send(transfer_id="t"))
            told = [
                stranger(NOBODY, "abort", daemon.directory, "t", gid=WORKERS),
                stranger(NOBODY, "silence", daemon.directory, gid=WORKERS),
            ]
            if defence is not None:
                assert told == ["aborted", "log_level_set"]
            else:
                assert told == ["control_denied"] * 2
            assert (victim.poll(Role.SOURCE).state is State.FAILED) is (defence is not None)
            assert daemon.status().log_level == ("info" if defence is None else "error")


def test_a_group_of_operators_alone_gets_no_worker_in(place: Path) -> None:
    with LiveDaemon(place / "a", operator_group=OPERATORS) as daemon, RawWorker(daemon.directory):
        assert stranger(NOBODY, "drain", daemon.directory, gid=OPERATORS) == "draining"
        assert stranger(NOBODY, "files", daemon.directory, gid=OPERATORS) == ""


def test_a_daemon_without_its_group_closes_what_the_one_before_left_open(place: Path) -> None:
    with LiveDaemon(place / "a", **BOTH) as daemon, RawWorker(daemon.directory) as raw:
        raw.snapshot(worker.Send(transfer_id="t"))
        daemon.process.kill()
        daemon.process.wait()
        daemon.stop()
        with LiveDaemon(daemon.directory):
            assert {mode & 0o077 for mode, _ in modes(daemon.directory).values()} == {0}


def test_a_second_daemon_does_not_close_the_first_ones_directory(place: Path) -> None:
    with LiveDaemon(place / "a", **BOTH) as daemon:
        assert "is held by" in kvferry("serve", "--runtime-dir", daemon.directory).stderr
        assert stranger(NOBODY, "hello", daemon.directory, gid=WORKERS) == "welcome"


def test_a_daemon_that_is_not_root_sees_workers_of_other_users_die(place: Path) -> None:
    """It may look at their lock files, as one of their group, and remove them from its folder."""
    place.chmod(0o777)
    here, there = socket.socketpair()
    daemon = os.fork()
    if daemon == 0:
        code = 1
        try:
            os.setgroups([WORKERS])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            watch(place / "a", there)
            code = 0
        finally:
            os._exit(code)
    try:
        assert here.recv(64) == b"ready"
        with started(f"{OTHER}:{WORKERS}", "hold", place / "a") as one:
            assert one.stdout is not None
            here.sendall(one.stdout.readline().strip().encode())
            assert here.recv(64) == b"living"
            one.kill()
            one.wait()
        here.sendall(b"look")
        assert here.recv(64) == b"dead"
    finally:
        here.close()
        there.close()
        assert os.waitpid(daemon, 0)[1] == 0


def watch(path: Path, told: socket.socket) -> None:
    """What a daemon does with the lock file that it is told of."""
    directory = RuntimeDir(path, Access(worker_gid=WORKERS))
    liveness = Liveness(directory.workers)
    told.sendall(b"ready")
    name = told.recv(64).decode()
    assert liveness.is_held(name)
    assert (directory.workers / name).stat().st_uid == OTHER
    liveness.watch("session", name)
    told.sendall(b"dead" if liveness.dead() else b"living")
    told.recv(64)
    told.sendall(b"dead" if liveness.dead() else b"living")
    liveness.forget("session")
    assert list(directory.workers.iterdir()) == []
    liveness.close()
    directory.close(keep=False)


def test_a_group_that_the_daemon_is_not_in_is_refused_with_a_remedy(place: Path) -> None:
    place.chmod(0o777)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with pytest.raises(DirectoryRefused, match="as a member of it"):
                RuntimeDir(place / "a", Access(worker_gid=WORKERS))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
