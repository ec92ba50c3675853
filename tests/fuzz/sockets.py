"""Frames on the real sockets of a real daemon, beside the transfer of somebody honest.

Whatever comes: the daemon lives and answers, its memory stays where it was, and the honest transfer
is what it was.
"""

import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import zmq

from fuzz.kept import kept
from fuzz.mutate import mutated
from fuzz.seeds import told
from kvferry_proto import control, peer, worker
from kvferry_proto.chunk import pack_greeting
from kvferry_proto.codec import Codec
from kvferry_proto.states import Role, State
from live import BLOCK, WINDOW, LiveDaemon, RawPeer, RawWorker
from tcp.door import client_hello

FRAMES_A_LOOK = 100  # as many may wait in a socket without one being dropped
CONNECTIONS_A_LOOK = 2
WAIT_MS = 20_000
REPLIES = (
    "welcome", "snapshots", "failure", "batch_reply",
    "status", "control_failure",
)  # fmt: skip
GROWTH_MIB = 100  # of the daemon: pools that frames ask for are in its budget, and not in this
DAEMON = {"budget_bytes": "64MiB", "log_level": "error", "lost_s": 600, "stall_s": 600}
# What an operator's question changes is right: none of these is of the honest transfer.
QUESTIONS: tuple[control.Request, ...] = (
    control.GetStatus(),
    control.GetTransfers(transfer_id="theirs", limit=2, state=State.FAILED, sort="age"),
    control.GetTransfers(role=Role.SINK, peer="x", age_s=0.5, idle_s=0.5, limit=3),
    control.Explain(transfer_id="theirs"),
    control.Explain(transfer_id="nobody"),
    control.AbortTransfer(transfer_id="theirs", attempt=1, reason="fuzz"),
    control.SetLogLevel(level="error"),
)
# The last attempt that there is: a higher one of any worker would take over, as a retry does.
HONEST: dict[str, Any] = {"transfer_id": "honest", "attempt": 1 << 31}


def others_calls() -> list[bytes]:
    """What nobody but the honest worker may say."""
    calls: list[Any] = [
        worker.Receive(**HONEST),
        worker.Send(**HONEST, total_tokens=2 * WINDOW),
        worker.Ready(**HONEST, ready_tokens=2 * BLOCK),
        worker.Resume(**HONEST, sent_tokens=BLOCK),
    ]
    for role in Role:
        named: dict[str, Any] = {"role": role, **HONEST}
        calls += [worker.Abort(**named), worker.Release(**named)]
        calls.append(worker.Poll(transfers=[worker.Watched(**named)]))
    return [worker.CALLS.encode(call) for call in calls]


class Sockets:
    """A daemon with an honest worker; a worker, a daemon and a connection that are none."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._frames = 0
        self._directory = Path(tempfile.mkdtemp(prefix="kvferry-fuzz-"))
        encryption: peer.Encryption = dice.choice(("off", "tls"))
        self._way = peer.Ways(payload_encryption=encryption)
        flags = {**DAEMON, "payload_encryption": encryption}
        self._daemon = LiveDaemon(self._directory / "d", **flags)
        self._honest = RawWorker(self._daemon.directory)
        self._honest.snapshot(worker.Send(**HONEST, total_tokens=2 * WINDOW))
        fits = lambda seen: seen.allocated_tokens == WINDOW
        window = self._wait_for(Role.SOURCE, fits)
        self._honest.fill(window, BLOCK)
        self._honest.snapshot(worker.Ready(**HONEST, ready_tokens=BLOCK))
        self._honest.snapshot(worker.Receive(**HONEST))  # else anybody who knows its id might
        arrived = lambda seen: seen.sent_tokens == BLOCK
        self._before = [self._wait_for(role, arrived) for role in Role]
        self._false = RawWorker(self._daemon.directory)
        self._calls = (*told().calls, *kept("worker"), *others_calls())
        self._asks = [control.REQUESTS.encode(one) for one in QUESTIONS]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._operator = self._context.socket(zmq.DEALER)
        self._operator.connect(f"ipc://{self._daemon.directory / 'control.sock'}")
        self._peer = RawPeer(self._daemon.address)
        self._greet()
        answer = self._peer.say(
            peer.OpenStream(stream=0, connection=0, ways=self._way, **self._boots)
        )
        self._port = answer.port
        self._memory_mib = self._rss_mib()

    def __call__(self) -> bytes:
        (door,) = self._dice.choices(("worker", "peer", "control"), (4, 4, 1))
        seeds, sock = {
            "worker": (self._calls, self._false.socket),
            "peer": (self._said, self._peer.socket),
            "control": (self._asks, self._operator),
        }[door]
        frame = mutated(self._dice.choice(seeds), self._dice, seeds)
        sock.send(frame)
        self._frames += 1
        if self._frames % FRAMES_A_LOOK == 0:
            self._look()
        return frame

    def _wait_for(self, role: Role, fits: Callable[[worker.Snapshot], bool]) -> worker.Snapshot:
        until_s = time.monotonic() + WAIT_MS / 1000
        while not fits(seen := self._honest.poll(role, **HONEST)):
            assert time.monotonic() < until_s, seen
        return seen

    def close(self) -> None:
        """Look once more, and leave nothing behind."""
        try:
            self._look()
        finally:
            self._peer.close()
            self._context.destroy(linger=0)
            for one in (self._false, self._honest):
                one.close()
            self._daemon.stop()
            shutil.rmtree(self._directory)

    def _greet(self) -> None:
        """Begin another link: frames that went before may have ended the last one."""
        boot_id = secrets.token_hex(16)
        hello = peer.PeerHello(boot_id=boot_id, daemon_id=boot_id, life=1)
        self._peer.socket.send(peer.MESSAGES.encode(hello))
        welcome = self._read(
            self._peer.socket, peer.MESSAGES, lambda told: told.sink_boot_id == boot_id
        )
        self._boots: dict[str, Any] = {
            "source_boot_id": welcome.boot_id, "sink_boot_id": boot_id
        }  # fmt: skip
        want = peer.Want(first_token=0, tokens=BLOCK, stream=0, connection=0)
        pull = self._peer.a_pull(transfer_id="theirs", want=[want])
        own: list[peer.PeerMessage] = [
            hello,
            peer.Ping(**self._boots),
            peer.OpenStream(stream=0, connection=0, ways=self._way, **self._boots),
            peer.Pulls(pulls=[pull], **self._boots),
            peer.Done(transfer_id="theirs", attempt=0, state=State.FAILED, **self._boots),
        ]
        mine = [peer.MESSAGES.encode(one) for one in own]
        self._said = (*mine * 8, *told().to_source, *kept("peer"))

    def _look(self) -> None:
        for _ in range(CONNECTIONS_A_LOOK):
            self._connect()
        self._greet()
        mark = secrets.randbits(62)
        self._false.socket.send(worker.CALLS.encode(worker.Heartbeat(call=mark)))
        self._read(self._false.socket, worker.REPLIES, lambda reply: reply.call == mark)
        self._operator.send(control.REQUESTS.encode(control.GetStatus(call=mark)))
        self._read(self._operator, control.ANSWERS, lambda answer: answer.call == mark)
        assert self._daemon.process.poll() is None, self._daemon.log()
        assert "Traceback" not in self._daemon.log(), self._daemon.log()[-4000:]
        now = [self._honest.poll(role, **HONEST) for role in Role]
        assert now == self._before, f"{self._before} became {now}"
        grown_mib = self._rss_mib() - self._memory_mib
        assert grown_mib < GROWTH_MIB, f"{grown_mib:.0f} MiB more than before"

    def _read(self, sock: "zmq.Socket[bytes]", family: Codec[Any], wanted: Any) -> Any:
        """All answers up to the wanted one: each is a message, whatever it answers."""
        while sock.poll(WAIT_MS):
            answer = family.decode(sock.recv())
            if getattr(answer, "kind", "") in ("peer_welcome", *REPLIES) and wanted(answer):
                return answer
        raise AssertionError("the daemon does not answer any more")

    def _connect(self) -> None:
        """A data connection that says something near to a greeting."""
        seeds = [pack_greeting(secrets.token_bytes(32)), client_hello(), *kept("head")]
        with socket.create_connection(("127.0.0.1", self._port), 5) as sock, suppress(OSError):
            sock.sendall(mutated(self._dice.choice(seeds), self._dice, seeds))

    def _rss_mib(self) -> float:
        status = Path(f"/proc/{self._daemon.process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return int(lines["RssAnon"].split()[0]) / 1024
