"""What a status board must not answer, and whose its slots are."""

import os
from pathlib import Path
from typing import Any

import pytest

from client.payloads import LAYOUT, payload
from kvferry_client import FerryError, Role, State, connect
from kvferry_proto import worker
from live import LiveDaemon

WATCHED = worker.Watched(role=Role.SOURCE, transfer_id="t")


def test_a_client_that_is_closed_or_forked_does_not_look(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        client.send("t")
        client.poll(WATCHED)
        client.poll(WATCHED)
        child = os.fork()
        if child == 0:
            try:
                client.poll(WATCHED)
            except FerryError as error:
                os._exit(0 if "fork" in error.message else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(FerryError) as caught:
        client.poll(WATCHED)
    assert caught.value.code == "client_closed"


def test_what_is_no_poll_is_refused_as_ever(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        bad: list[Any]
        for bad in ([], ["t"], [1, WATCHED]):
            with pytest.raises(FerryError) as caught:
                client.poll(*bad)
            assert caught.value.code == "bad_message"


def test_the_slot_of_a_forgotten_transfer_goes_to_another(daemon: LiveDaemon) -> None:
    with connect(daemon.directory, LAYOUT) as client:
        sending = client.send("t")
        [first] = client.poll(WATCHED).transfers
        client.poll(WATCHED)
        sending.abort("enough")
        other = WATCHED.model_copy(update={"transfer_id": "u"})
        client.send("u").fill(0, payload(5))
        [second] = client.poll(other).transfers
        assert first.slot is not None
        assert second.slot is not None
        assert first.slot.index == second.slot.index
        [old] = client.poll(WATCHED).transfers
        assert (old.transfer_id, old.state, old.slot) == ("t", State.FAILED, None)
        assert client.poll(other).transfers[0].available_tokens == 5


def test_another_clients_slot_is_not_taken_for_ones_own(daemon: LiveDaemon) -> None:
    """The slot goes on while this one is not looking: only the key tells."""
    with connect(daemon.directory, LAYOUT) as client, connect(daemon.directory, LAYOUT) as other:
        sending = client.send("t")
        client.poll(WATCHED)
        client.poll(WATCHED)
        sending.abort("enough")
        for name in "uv":
            other.send(name).fill(0, payload(5))
            other.poll(WATCHED.model_copy(update={"transfer_id": name}))
        [old] = client.poll(WATCHED).transfers
        assert (old.transfer_id, old.state, old.available_tokens) == ("t", State.FAILED, 0)


def test_who_finds_no_slot_polls_by_message(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(4097)]
    with (
        LiveDaemon(tmp_path / "a", lost_s=30) as daemon,
        connect(daemon.directory, LAYOUT) as client,
    ):
        for first in range(0, len(names), 256):
            calls: list[worker.Verb] = [
                worker.Send(transfer_id=one) for one in names[first : first + 256]
            ]
            client.call(worker.Batch(calls=calls))
        watched = [WATCHED.model_copy(update={"transfer_id": one}) for one in names]
        for first in range(0, 4096, 1024):  # a frame has no room for more
            given = client.poll(*watched[first : first + 1024]).transfers
            assert all(one.slot is not None for one in given)
        for _ in range(2):
            [late] = client.poll(watched[-1]).transfers
            assert (late.transfer_id, late.slot) == (names[-1], None)
        daemon.pause()
        assert [one.transfer_id for one in client.poll(*watched[:-1]).transfers] == names[:-1]
        daemon.resume()


def test_thousands_that_are_up_to_date_learn_their_slots_in_frames_of_a_bounded_size(
    daemon: LiveDaemon,
) -> None:
    """All of them in one answer would be over a frame's limit."""
    names = [f"t{number}" for number in range(4096)]
    with connect(daemon.directory, LAYOUT) as client:
        watched = []
        for first in range(0, len(names), 256):
            sends: list[worker.Verb] = [
                worker.Send(transfer_id=one) for one in names[first : first + 256]
            ]
            for reply in client.call(worker.Batch(calls=sends)).replies:
                [seen] = reply.transfers
                named = {"transfer_id": seen.transfer_id, "after": seen.snapshot}
                watched.append(WATCHED.model_copy(update=named))
        for _ in range(len(names) // 128):
            assert client.poll(*watched).transfers == []
        daemon.pause()
        assert client.poll(*watched).transfers == []
        daemon.resume()
