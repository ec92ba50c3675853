"""Other users of the machine, against the worker and control sockets. Needs root, to be them."""

import os
from pathlib import Path

import pytest
import zmq

from attacks.scene import NOBODY, OTHER, open_to_all, stranger, without
from kvferry_proto import worker
from live import LAYOUT, LiveDaemon, RawWorker

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")


def test_the_directory_keeps_other_users_out(place: Path) -> None:
    with LiveDaemon(place / "a") as daemon:
        assert stranger(NOBODY, "status", daemon.directory) == "nothing"
        assert daemon.status().counters.get("connections_refused", 0) == 0  # none got so far
        open_to_all(daemon)
        stranger(NOBODY, "status", daemon.directory)
        assert daemon.status().counters["connections_refused"] > 0


def test_the_sockets_themselves_are_closed_to_other_users(place: Path) -> None:
    """libzmq leaves their modes to the umask."""
    for defence, reached in (("files_are_open", "control.sock worker.sock"), (None, "")):
        with without(defence)(place / str(defence)) as daemon:
            daemon.directory.chmod(0o755)
            assert stranger(NOBODY, "reach", daemon.directory) == reached


@pytest.mark.parametrize(("act", "answer"), [("hello", "welcome"), ("status", "status")])
def test_another_user_gets_no_answer(place: Path, act: str, answer: str) -> None:
    for defence, told in (("anybody_connects", answer), (None, "nothing")):
        with without(defence)(place / str(defence)) as daemon:
            open_to_all(daemon)
            assert stranger(NOBODY, act, daemon.directory) == told
            assert stranger(0, act, daemon.directory) == answer  # root may


def test_a_refused_user_is_in_the_log(place: Path) -> None:
    with LiveDaemon(place / "a") as daemon:
        open_to_all(daemon)
        stranger(NOBODY, "hello", daemon.directory)
        daemon.wait_for_log(f"uid {NOBODY}, gid {NOBODY}")


def test_another_users_session_is_not_taken_up_with_its_secret(place: Path) -> None:
    for defence, told in (("secret_is_enough", "welcome"), ("anybody_connects", "unknown_session")):
        with without(defence)(place / defence) as daemon, RawWorker(daemon.directory) as victim:
            open_to_all(daemon)
            assert victim.welcome is not None
            secret, lock = victim.welcome.session, victim.lock_name
            assert stranger(OTHER, "take_up", daemon.directory, secret, lock) == told
            assert stranger(0, "take_up", daemon.directory, secret, lock) == "welcome"


def test_nor_is_it_in_the_daemons_next_life(place: Path) -> None:
    for defence, told in (("secret_is_enough", "welcome"), ("anybody_connects", "unknown_session")):
        daemon = without(defence)(place / defence)
        with RawWorker(daemon.directory) as victim:
            assert victim.welcome is not None
            secret, lock = victim.welcome.session, victim.lock_name
            victim.snapshot(worker.Send(transfer_id="t"))  # it is in the ledger, with its session
            daemon.process.kill()
            with daemon.again() as again:
                open_to_all(again)
                assert stranger(OTHER, "take_up", again.directory, secret, lock) == told
                assert stranger(0, "take_up", again.directory, secret, lock) == "welcome"


def test_a_routing_id_that_was_taken_over_has_no_session(place: Path) -> None:
    for defence, told in (("routes_are_trusted", "snapshots"), ("anybody_connects", "hello_first")):
        with without(defence)(place / defence) as daemon, RawWorker(daemon.directory) as victim:
            open_to_all(daemon)
            assert victim.welcome is not None
            route = b"mine"
            socket = victim.context.socket(zmq.DEALER)
            socket.setsockopt(zmq.ROUTING_ID, route)
            socket.connect(f"ipc://{daemon.directory / 'worker.sock'}")
            again = worker.Hello(
                lock=victim.lock_name, layout=LAYOUT, session=victim.welcome.session
            )
            socket.send(worker.CALLS.encode(again))
            assert worker.REPLIES.decode(socket.recv()).kind == "welcome"
            socket.close(linger=0)
            assert stranger(OTHER, "squat", daemon.directory, route.hex()) == told


def test_a_routing_id_that_is_in_use_is_not_taken_over(place: Path) -> None:
    for defence, told in (("handover", "snapshots"), ("anybody_connects", "nothing")):
        with without(defence)(place / defence) as daemon, RawWorker(daemon.directory) as victim:
            open_to_all(daemon)
            assert victim.welcome is not None
            socket = victim.context.socket(zmq.DEALER)
            socket.setsockopt(zmq.ROUTING_ID, b"mine")
            socket.connect(f"ipc://{daemon.directory / 'worker.sock'}")
            session = victim.welcome.session
            again = worker.Hello(lock=victim.lock_name, layout=LAYOUT, session=session)
            socket.send(worker.CALLS.encode(again))
            assert worker.REPLIES.decode(socket.recv()).kind == "welcome"
            assert stranger(OTHER, "squat", daemon.directory, b"mine".hex()) == told
            socket.close(linger=0)


def test_workers_are_shown_with_what_the_kernel_says_of_them(place: Path) -> None:
    with LiveDaemon(place / "a") as daemon, RawWorker(daemon.directory) as raw:
        raw.snapshot(worker.Send(transfer_id="t"))
        user = f"{os.getuid()}:{os.getgid()}:{os.getpid()}"
        assert [one.user for one in daemon.status().sessions or ()] == [user]
        assert [one.user for one in daemon.transfers("t")] == [user]
