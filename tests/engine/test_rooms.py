"""Bootstrap rooms: numbers that come back, for transfers whose names must not."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kvferry_client.sglang_rooms import KEPT_S, RoomBook, Rooms, Ticket

WAIT_S = 20.0


def test_ranks_that_open_a_room_and_ranks_that_take_it_mean_the_same() -> None:
    book = RoomBook()
    one = book.open(7, "p0", "first", "tcp://a", 0)
    assert book.open(7, "p1", "second", "tcp://a", 0) is one
    assert book.take(7, "d0", "third") is book.take(7, "d1", "fourth") is one


def test_a_room_that_comes_back_has_another_name() -> None:
    book = RoomBook()
    one, two = book.open(7, "p", "first", "", 0), book.open(7, "p", "second", "", 1)
    assert one.transfer_id != two.transfer_id
    assert book.take(7, "d", "third") is one
    assert book.take(7, "d", "fourth") is two
    assert book.take(7, "d", "fifth") is None


def test_a_call_that_is_repeated_changes_nothing() -> None:
    book = RoomBook()
    one = book.open(7, "p", "first", "", 0)
    assert book.open(7, "p", "first", "", 1) is one
    assert book.take(7, "d", "second") is book.take(7, "d", "second") is one


def test_rooms_are_forgotten_after_a_while() -> None:
    book = RoomBook()
    for room in range(5):
        book.open(room, "p", f"call {room}", "", room)
    book.open(9, "p", "late", "", KEPT_S + 2)
    assert [room for room in (*range(5), 9) if book.take(room, "d", "call")] == [3, 4, 9]


@contextmanager
def served(book: RoomBook, answers: threading.Event) -> Iterator[str]:
    """A book behind HTTP; it answers while ``answers`` is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if answers.is_set() else 503)
            self.end_headers()
            if answers.is_set():
                self.wfile.write(json.dumps(book.answer(json.loads(body), 0)).encode())

        def log_message(self, *_args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answered(ticket: Ticket) -> Ticket:
    until_s = time.monotonic() + WAIT_S
    while ticket.is_open:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    return ticket


def test_decode_may_ask_before_prefill_and_through_a_server_that_is_away() -> None:
    answers = threading.Event()
    with served(RoomBook(), answers) as server:
        unwanted: list[Ticket] = []
        decode = Rooms("take", WAIT_S, unwanted.append)
        prefill = Rooms("open", WAIT_S, unwanted.append)
        prefill.source = "tcp://source"
        taken = [decode.ask(server, room) for room in range(3)]
        opened = [prefill.ask(server, room) for room in reversed(range(3))]
        assert all(one.is_open for one in taken + opened)
        answers.set()
        names = [answered(one).transfer_id for one in taken]
        assert names == [answered(one).transfer_id for one in reversed(opened)]
        assert len(set(names)) == 3
        assert {one.source for one in taken} == {"tcp://source"}
        assert not unwanted


def test_a_request_that_is_given_up_is_not_left_for_the_next_in_its_room() -> None:
    answers = threading.Event()
    answers.set()
    with served(RoomBook(), answers) as server:
        unwanted: list[Ticket] = []
        decode = Rooms("take", WAIT_S, unwanted.append)
        prefill = Rooms("open", WAIT_S, unwanted.append)
        given_up, wanted = decode.ask(server, 7), decode.ask(server, 7)
        assert not given_up.give_up()
        names = [answered(prefill.ask(server, 7)).transfer_id for _ in range(2)]
        assert [answered(one).transfer_id for one in (given_up, wanted)] == names
        assert unwanted == [given_up]
        assert wanted.give_up(), "its answer is here"
        assert unwanted == [given_up]


def test_a_room_that_nobody_opens_is_given_up() -> None:
    answers = threading.Event()
    answers.set()
    with served(RoomBook(), answers) as server:
        ticket = answered(Rooms("take", 0.1, print).ask(server, 5))
    assert ticket.error == "room 5 was not opened for 0.1 s"
