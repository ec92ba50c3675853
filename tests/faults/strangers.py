"""A source's daemon that does not keep to the protocol."""

import os
import secrets
import socket
import threading
from contextlib import suppress
from typing import Any, Literal, Self

import zmq

from kvferry_proto import peer
from kvferry_proto.chunk import GREETING_BYTES, ChunkHeader, pack_accept
from kvferry_proto.states import State
from live import BLOCK, LAYOUT, WINDOW

Manner = Literal["garbage for answers", "garbage for chunks", "half a chunk", "always another life"]
PULLS_A_LIFE = 3


class FalseSource:
    """Answers as it should until its manner comes through."""

    def __init__(self, manner: Manner) -> None:
        self.manner = manner
        self.boot_id = secrets.token_hex(16)
        self.met = 0  # how often its manner came through
        self._pulls = 0
        self._handle = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self.address = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._door = socket.create_server(("127.0.0.1", 0))
        self._streams: list[socket.socket] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        self._thread.join()
        for sock in (self._door, *self._streams):
            sock.close()
        self._router.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._door, zmq.POLLIN)
        while not self._over.is_set():
            ready = dict(poller.poll(50))
            if self._door.fileno() in ready:
                self._take_in()
            if self._router in ready:
                route, frame = self._router.recv_multipart()
                for answer in self._answers(peer.MESSAGES.decode(frame)):
                    self._router.send_multipart([route, answer])

    def _answers(self, message: Any) -> list[bytes]:
        if self.manner == "garbage for answers":
            self.met += 1
            return [os.urandom(40), b"", b"\x91" * 500]
        answer = self._answer(message)
        return [] if answer is None else [peer.MESSAGES.encode(answer)]

    def _answer(self, message: Any) -> Any:
        if isinstance(message, peer.PeerHello):
            return peer.PeerWelcome(version=1, boot_id=self.boot_id, sink_boot_id=message.boot_id)
        boots: dict[str, Any] = {
            "source_boot_id": self.boot_id,
            "sink_boot_id": message.sink_boot_id,
        }
        if isinstance(message, peer.Ping):
            return peer.Pong(news=0, **boots)
        if isinstance(message, peer.OpenStream):
            return peer.Ticket(
                stream=message.stream,
                connection=message.connection,
                port=self._door.getsockname()[1],
                ticket=secrets.token_bytes(32),
                **boots,
            )
        if isinstance(message, peer.Done):
            return peer.DoneNoted(transfer_id=message.transfer_id, attempt=message.attempt, **boots)
        if isinstance(message, peer.Pulls):
            return self._progress(message, boots)
        return None

    def _progress(self, pulls: peer.Pulls, boots: dict[str, Any]) -> Any:
        self._pulls += 1
        if self.manner == "always another life" and self._pulls % PULLS_A_LIFE == 0:
            self.met += 1
            self.boot_id = secrets.token_hex(16)
            boots = {**boots, "source_boot_id": self.boot_id}
        pull = pulls.pulls[0]
        if self.manner == "half a chunk" and pull.want and pull.handle != self._handle:
            self._handle = pull.handle
            self._send_half(pull)
        progress = peer.Progress(
            transfer_id=pull.transfer_id,
            attempt=pull.attempt,
            number=pull.number,
            state=State.TRANSFERRING,
            available_tokens=WINDOW,
        )
        return peer.Progresses(before=self._pulls - 1, progresses=[progress], **boots)

    def _take_in(self) -> None:
        sock, _ = self._door.accept()
        self._streams.append(sock)
        with suppress(OSError):
            sock.recv(GREETING_BYTES, socket.MSG_WAITALL)
            sock.sendall(pack_accept(True))
            if self.manner == "garbage for chunks":
                self.met += 1
                sock.sendall(os.urandom(4096))

    def _send_half(self, pull: peer.Pull) -> None:
        want = pull.want[0]
        size = want.tokens // BLOCK * LAYOUT.block_bytes
        header = ChunkHeader(pull.handle, want.first_token, want.tokens, size, True)
        with suppress(OSError):
            self._streams[-1].sendall(header.pack() + bytes(size // 2))
            self.met += 1
