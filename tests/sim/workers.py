"""A worker's process in the model: its session, its calls and their repeats, and its death."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Key
from kvferry_proto import worker
from kvferry_proto.errors import Code
from kvferry_proto.layout import Dtype, Layout, Plane
from sim.boards import ModelReader
from sim.jobs import is_wide
from sim.memory import BLOCK, WIDE, Broken

if TYPE_CHECKING:
    from sim.life import Life
    from sim.machine import Machine
    from sim.sides import Side
    from sim.world import World

PATIENCE_S = 0.4  # then a call is made again
BEAT_S = 1.0
Then = Callable[[worker.Snapshots | worker.Failure], None]

_PLANES = (Plane(name="kv", dtype=Dtype.UINT8, shape=(64,)),)
LAYOUTS = {
    (names, size): Layout(planes=_PLANES, aux=names, block_size_tokens=size)
    for names in ((), ("first",))
    for size in (BLOCK, WIDE)
}


class Lock:
    """A file on which a process holds a flock: the kernel drops it with the process."""

    __slots__ = ("alive",)

    def __init__(self) -> None:
        self.alive = True


class Process:
    """One process, from its start to its end. A restart is a new one."""

    def __init__(self, world: World, machine: Machine, name: str, number: int) -> None:
        self.world = world
        self.machine = machine
        self.name = name
        self.layout = world.layouts[WIDE if is_wide(name) else BLOCK]
        self.alive = True
        self.stopped_until_s = 0.0
        self._locks = 0
        self._process = number
        self.life: Life | None = None  # of the daemon, as far as the process knows
        self.session: str | None = None
        self._had_session: str | None = None
        self.joined = False
        self.sides: dict[tuple[Key, int], Side] = {}  # by transfer and rank
        self._number = 0
        self._calls: dict[int, tuple[worker.Verb | worker.Hello, Then | None]] = {}
        self._sides: dict[int, object] = {}  # whose a call is
        self.board: ModelReader | None = None  # the daemon's, as its welcome named it
        self._last_call_s = self._last_reply_s = self._beat_s = 0.0
        self._routes = 0
        self._route = b""
        self._take_lock()
        self.reconnect()
        self._beat()

    # --- calls ---

    def ask(self, kind: type[Any], then: Then, side: Side | None = None, **fields: Any) -> None:
        """Make a call; it is made again until an answer comes, or its ``side`` wants none."""
        self._number += 1
        self._calls[self._number] = (kind(call=self._number, **fields), then)
        self._sides[self._number] = side or getattr(then, "__self__", None)
        if self.joined:
            self._send(self._number)

    def forget(self, side: Side) -> None:
        """It wants no answer any more; nor its call, if that was lost."""
        for number in list(self._calls):
            if self._sides.get(number) is side:
                del self._calls[number]

    def _send(self, number: int) -> None:
        call, _ = self._calls[number]
        world = self.world
        self._beat_s = world.clock.now_s
        self._last_call_s = world.network.ipc(self._last_call_s, self._arrive, self._route, call)
        wait_s = getattr(call, "wait_s", 0.0)  # the daemon itself lets a poll wait
        world.clock.after(wait_s + PATIENCE_S, self._again, number)

    def _again(self, number: int) -> None:
        if not self.alive or number not in self._calls:
            return
        if self._is_stopped(self._again, number):
            return
        if self.joined or isinstance(self._calls[number][0], worker.Hello):
            self._send(number)

    def _arrive(self, route: bytes, call: Any) -> None:
        life = self.machine.life
        if life is not None and route == self._route:
            life.deliver(out.WorkerCalled(route, call, lock_held=self._kernel_lock.alive))

    def _is_stopped(self, do: Callable[..., Any], *args: Any) -> bool:
        """Whether the process stands still; then it is done later."""
        if self.stopped_until_s > self.world.clock.now_s:
            self.world.clock.at(self.stopped_until_s, do, *args)
            return True
        return False

    def later(self, wait_s: float, do: Callable[..., Any], *args: Any) -> None:
        """Let something happen in this process, if it still lives."""
        self.world.clock.after(wait_s, self._do, do, *args)

    def _do(self, do: Callable[..., Any], *args: Any) -> None:
        if self.alive and not self._is_stopped(self._do, do, *args):
            do(*args)

    def _beat(self) -> None:
        """Once a second, if nothing else was said."""
        if not self.alive or self._is_stopped(self._beat):
            return
        now_s = self.world.clock.now_s
        if self.joined and now_s >= self._beat_s + BEAT_S * 0.99:
            self._beat_s = now_s
            self._last_call_s = self.world.network.ipc(
                self._last_call_s, self._arrive, self._route, worker.Heartbeat()
            )
        self.world.clock.at(max(self._beat_s, now_s - BEAT_S / 2) + BEAT_S, self._beat)

    # --- answers ---

    def answered(self, life: Life, reply: out.WorkerReply) -> None:
        """The daemon has answered; it takes a moment until that is here."""
        self._last_reply_s = self.world.network.ipc(
            self._last_reply_s, self._on_reply, life, self._route, reply
        )

    def _on_reply(self, life: Life, route: bytes, reply: out.WorkerReply) -> None:
        if not self.alive or route != self._route:
            return
        if self._is_stopped(self._on_reply, life, route, reply):
            return
        if self.world.story is not None:
            self.world.say(self.name, "hears", reply)
        if isinstance(reply, worker.Failure) and reply.error.code == Code.HELLO_FIRST:
            self._hello()
            return
        entry = self._calls.pop(reply.call, None)
        self._sides.pop(reply.call, None)
        if entry is None:
            return  # answered twice, or nobody wants to know any more
        if isinstance(entry[0], worker.Hello):
            self._on_hello_reply(life, reply)
        elif entry[1] is not None:
            assert isinstance(reply, worker.Snapshots | worker.Failure), reply
            entry[1](reply)

    # --- the session ---

    def reconnect(self) -> None:
        """A new connection: what was under way on the old one is lost."""
        self.world.routes.pop(self._route, None)
        self._routes += 1
        self._route = f"{self.lock}.{self._routes}".encode()
        self.world.routes[self._route] = self
        self._hello()

    def _hello(self) -> None:
        if any(isinstance(call, worker.Hello) for call, _ in self._calls.values()):
            if self.joined:
                return
            self._calls = {
                n: c for n, c in self._calls.items() if not isinstance(c[0], worker.Hello)
            }
        self.joined = False
        self._number += 1
        hello = worker.Hello(
            call=self._number, lock=self.lock, layout=self.layout, session=self.session
        )
        self._calls[self._number] = (hello, None)
        self._send(self._number)

    def _on_hello_reply(self, life: Life, reply: out.WorkerReply) -> None:
        if isinstance(reply, worker.Failure):
            if reply.error.code == Code.UNKNOWN_SESSION:
                self.session = None
                self._hello()
            elif reply.error.code == Code.POOL_REFUSED:
                self.later(0.3, self._hello)
            elif reply.error.code == Code.WORKER_NOT_LOCKED:
                self._unlock()
                self._take_lock()
                self._hello()
            else:
                raise Broken(f"{self.name} is refused: {reply.error}")
            return
        assert isinstance(reply, worker.Welcome), reply
        if self.session is not None and self.session != reply.session:
            raise Broken(f"{self.name} got another session")
        restarted = self._had_session not in (None, reply.session)
        self._had_session = reply.session
        self.session, self.joined, self.life = reply.session, True, life
        self._look_at_board(reply)
        if restarted:
            self._lost_everything()
        for side in self.sides.values():
            side.adopt(life)
        for number in list(self._calls):
            self._send(number)

    def _look_at_board(self, welcome: worker.Welcome) -> None:
        """As a client does: one board a life of the daemon."""
        if self.board is not None and self.board.boot_id == welcome.boot_id:
            return
        if self.board is not None:
            self.board.leave()
        assert self.life is not None
        self.board = ModelReader(welcome, self.life.boards[self.layout.digest.hex()])

    def _lost_everything(self) -> None:
        """The daemon was started anew and knows none of this process's transfers."""
        self._calls.clear()
        self._sides.clear()
        for side in list(self.sides.values()):
            side.daemon_restarted()
        self.sides.clear()

    # --- faults ---

    def stop(self, for_s: float) -> None:
        """It stands still, as after SIGSTOP; its memory stays mapped."""
        self.stopped_until_s = max(self.stopped_until_s, self.world.clock.now_s + for_s)

    def crash(self) -> None:
        """It is gone: its mappings and its lock too."""
        if not self.alive:
            return
        self.world.say(self.name, "CRASH", "")
        self.alive = False
        self.world.routes.pop(self._route, None)
        self._calls.clear()
        for side in self.sides.values():
            side.process_died()
        self._unlock()

    def _take_lock(self) -> None:
        self._locks += 1
        self.lock = f"{self.name}-{self._process}-{self._locks}"
        self._kernel_lock = self.world.locks[self.lock] = Lock()

    def _unlock(self) -> None:
        self._kernel_lock.alive = False
        life = self.machine.life
        if life is not None:
            for session, lock in life.watched.items():
                if lock == self.lock:
                    life.lock_dropped(session)
