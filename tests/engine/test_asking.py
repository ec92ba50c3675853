"""How engines ask for bootstrap rooms: through a server that may be away, late or never right."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvferry_client import sglang_asking
from kvferry_client.sglang_asking import Rooms, Ticket
from kvferry_client.sglang_rooms import RoomBook

WAIT_S = 20.0
MODEL = {"model.weights": "one", "prompt": "x"}
BODY_BYTES_MAX = 1 << 20  # aiohttp's, and so SGLang's
MISTAKES = (
    "ends too early", "has other keys", "is a list", "is a number", "is not HTTP", "is not JSON",
)  # fmt: skip


class Server:
    """A book behind HTTP; it answers while ``answers`` is set. And who asks it.

    ``mistakes``: what it does instead, once each; ``is_broken``: and the last of them for ever.
    """

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.mistakes: list[str] = []
        self.is_broken = False
        self.unwanted: list[Ticket] = []
        self.decode = Rooms("take", WAIT_S, self.unwanted.append)
        self.prefill = Rooms("open", WAIT_S, self.unwanted.append)
        self.prefill.source = "tcp://source"
        book, lock, scene = RoomBook(), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if not scene.answers.is_set():
                    self.answer(503)
                elif length > BODY_BYTES_MAX:
                    self.answer(413)
                elif scene.mistakes:
                    last = scene.is_broken and len(scene.mistakes) == 1
                    self.make(scene.mistakes[0] if last else scene.mistakes.pop(0), body)
                else:
                    with lock:
                        known = book.answer(json.loads(body), time.monotonic())
                    self.answer(200, json.dumps(known))

            def answer(self, status: int, said: str = "", more_bytes: int = 0) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(said) + more_bytes))
                self.end_headers()
                self.wfile.write(said.encode())

            def make(self, mistake: str, body: bytes) -> None:
                calls = list(json.loads(body)["rooms"])
                if mistake == "is not HTTP":
                    self.wfile.write(b"nonsense\r\n")
                    return
                said = {
                    "ends too early": "{",
                    "has other keys": json.dumps({call: {"name": "t"} for call in calls}),
                    "is a list": json.dumps(calls),
                    "is a number": "1",
                    "is not JSON": "<html>",
                }[mistake]
                self.answer(200, said, more_bytes=mistake == "ends too early")

            def log_message(self, *_args: object) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.http.server_port}"

    def take(self, room: int, request: str = "r", **identity: str) -> Ticket:
        return self.decode.ask(self.address, room, request, MODEL | identity)

    def open(self, room: int, request: str = "r", **identity: str) -> Ticket:
        return self.prefill.ask(self.address, room, request, MODEL | identity)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.http:
        thread = threading.Thread(target=server.http.serve_forever)
        thread.start()
        yield server
        server.http.shutdown()
        thread.join()


def wait_for(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def answered(ticket: Ticket) -> Ticket:
    wait_for(lambda: not ticket.is_open)
    return ticket


def test_decode_may_ask_before_prefill_and_through_a_server_that_is_away(server: Server) -> None:
    server.answers.clear()
    taken = [server.take(room) for room in range(3)]
    opened = [server.open(room) for room in reversed(range(3))]
    assert all(one.is_open for one in taken + opened)
    server.answers.set()
    names = [answered(one).transfer_id for one in taken]
    assert names == [answered(one).transfer_id for one in reversed(opened)]
    assert len(set(names)) == 3
    assert {one.source for one in taken} == {"tcp://source"}
    assert not server.unwanted


def test_a_request_that_is_given_up_leaves_the_next_in_its_room_alone(server: Server) -> None:
    given_up = server.take(7, "given up")
    assert not given_up.give_up()
    wanted = server.take(7, "wanted")
    name = answered(server.open(7, "wanted")).transfer_id
    assert answered(wanted).transfer_id == name
    late = answered(server.open(7, "given up")).transfer_id
    assert answered(given_up).transfer_id == late
    assert server.unwanted == [given_up], "so that its source is told"
    assert wanted.give_up(), "its answer is here"
    assert server.unwanted == [given_up]


def test_a_request_that_fails_before_it_asks_declines_what_prefill_opens(server: Server) -> None:
    ticket = server.decode.ask(server.address, 7, "r", MODEL, wanted=False)
    name = answered(server.open(7)).transfer_id
    assert answered(ticket).transfer_id == name
    wait_for(lambda: server.unwanted == [ticket])


@pytest.mark.parametrize(("field", "there"), [("model.weights", "other"), ("prompt", "y")])
def test_another_model_or_prompt_is_refused_by_name(server: Server, field: str, there: str) -> None:
    name = answered(server.open(7, **{field: there})).transfer_id
    ticket = answered(server.take(7))
    here = MODEL[field]
    words = f"payload_mismatch: {name}: {field}: {there} at the source, {here} here"
    assert ticket.error is not None
    assert ticket.error.startswith(words)
    wait_for(lambda: server.unwanted == [ticket])
    assert not ticket.give_up(), "its source is told once"


@pytest.mark.parametrize("was_opened", [True, False])
def test_decode_is_told_what_prefill_has_given_up(server: Server, was_opened: bool) -> None:
    ticket = answered(server.open(7)) if was_opened else Ticket(7, "r", MODEL, 0)
    answered(server.prefill.withdraw(server.address, ticket, "aborted by its engine"))
    taken = answered(server.take(7))
    assert taken.error == "prefill has given it up: aborted by its engine"
    assert not server.unwanted


def test_a_room_that_nobody_opens_is_given_up(server: Server) -> None:
    ticket = answered(Rooms("take", 0.1, print).ask(server.address, 5, "r", MODEL))
    assert ticket.error == "room 5 was not opened for 0.1 s"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_room_is_asked_for_again_after_an_answer_that_is_of_no_use(
    server: Server, mistake: str
) -> None:
    """Whatever it is: nobody else would ask for any room of this prefill's, ever."""
    server.mistakes.append(mistake)
    name = answered(server.open(7)).transfer_id
    assert name is not None
    server.mistakes.append(mistake)
    assert answered(server.take(7)).transfer_id == name
    assert not server.mistakes


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_server_that_gives_no_other_answer_is_given_up(
    server: Server, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_asking, "UNREACHABLE_S", 0.1)
    server.mistakes.append(mistake)
    server.is_broken = True
    ticket = answered(server.take(7))
    assert ticket.transfer_id is None
    assert f"bootstrap server at {server.address} gave no answer: " in str(ticket.error)


def test_thousands_of_rooms_are_asked_for_though_no_call_may_have_them_all(server: Server) -> None:
    model = {"model.weights": "w" * 200}
    rooms = range(6000)
    calls = [{"identity": MODEL | model, "room": room} for room in rooms]
    assert len(json.dumps(calls)) > BODY_BYTES_MAX
    opened = [server.open(room, **model) for room in rooms]
    taken = [server.take(room, **model) for room in rooms]
    names = [answered(one).transfer_id for one in opened]
    assert [answered(one).transfer_id for one in taken] == names
    assert len(set(names)) == len(rooms)


def test_a_room_that_is_no_number_fails_alone(server: Server) -> None:
    server.answers.clear()
    wrong = server.decode.ask(server.address, "seven", "wrong", MODEL)  # type: ignore[arg-type]
    right = server.take(7)
    server.answers.set()
    name = answered(server.open(7)).transfer_id
    assert answered(right).transfer_id == name
    assert "not a question for rooms: ValueError" in str(answered(wrong).error)


def test_what_prefill_gives_up_before_it_knows_its_name_is_declined_under_it(
    server: Server,
) -> None:
    """Decode may have the name before prefill has, and waits for it at its daemon."""
    server.answers.clear()
    given_up = server.open(7)
    server.prefill.withdraw(server.address, given_up, "aborted by its engine")
    assert not given_up.give_up()
    server.answers.set()
    assert answered(given_up).transfer_id is not None
    wait_for(lambda: server.unwanted == [given_up])
