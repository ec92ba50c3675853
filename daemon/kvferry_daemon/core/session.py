"""A worker that has said hello."""

from dataclasses import dataclass, field

from kvferry_daemon.core.events import Key


@dataclass(slots=True)
class Session:
    """One worker: the secret is its identity, across connections."""

    secret: str
    name: str
    pid: int
    lock: str
    pool_id: str
    heard_s: float
    user: str = ""  # uid:gid:pid of who opened it
    lost: bool = False
    routes: dict[bytes, None] = field(default_factory=dict)
    keys: dict[Key, None] = field(default_factory=dict)

    @property
    def kernel_pid(self) -> str:
        """The process that opened it; ``pid`` is its own word, and of another namespace maybe."""
        return self.user.rpartition(":")[2] or "?"

    def belongs_to(self, user: str) -> bool:
        """Whether this user may take it up: a worker's children and its next life are its own."""
        return user.partition(":")[0] == self.user.partition(":")[0]
