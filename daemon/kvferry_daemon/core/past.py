"""What the rows of a ledger say: read strictly, and checked against each other."""

from dataclasses import dataclass, field

from kvferry_daemon.core.events import Key
from kvferry_daemon.core.records import (
    RECORDS,
    AuxRecord,
    DaemonRecord,
    OpeningRecord,
    PoolRecord,
    SessionRecord,
    StoneRecord,
    TransferRecord,
)
from kvferry_proto.errors import FerryError
from kvferry_proto.states import Role


class LedgerWrong(ValueError):
    """The ledger holds what cannot have been."""


@dataclass(slots=True)
class Past:
    """The rows of a ledger, read and sorted; ``LedgerWrong`` names the row that is none."""

    daemon: DaemonRecord | None = None
    pools: list[PoolRecord] = field(default_factory=list)
    sessions: list[SessionRecord] = field(default_factory=list)
    openings: dict[Key, OpeningRecord] = field(default_factory=dict)
    aux: dict[Key, AuxRecord] = field(default_factory=dict)
    transfers: dict[Key, TransferRecord] = field(default_factory=dict)
    stones: dict[Key, StoneRecord] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # pools whose files are wrong, and how

    def add(self, name: str, body: bytes) -> None:
        """Read one row."""
        try:
            record = RECORDS.decode(body)
            match record:
                case DaemonRecord():
                    self.daemon = record
                case PoolRecord():
                    self.pools.append(record)
                case SessionRecord():
                    self.sessions.append(record)
                case OpeningRecord():
                    self.openings[key_of(name)] = record
                case AuxRecord():
                    self.aux[key_of(name)] = record
                case TransferRecord():
                    self.transfers[key_of(name)] = record
                case StoneRecord():
                    self.stones[key_of(name)] = record
        except (FerryError, ValueError) as error:
            raise LedgerWrong(f"row {name[:80]!r}: {error}") from error

    def check(self) -> None:
        """Raise LedgerWrong unless every row has the rows that it speaks of."""
        pools = {pool.pool_id for pool in self.pools}
        for session in self.sessions:
            if session.pool_id not in pools:
                raise LedgerWrong(f"a session has pool {session.pool_id}, which is not there")
        for key in self.transfers:
            opening = self.openings.get(key)
            if opening is None or opening.pool_id not in pools:
                raise LedgerWrong(f"{key} has no opening, or no pool")


def key_of(name: str) -> Key:
    """The transfer that a row's name belongs to; ValueError if it is none."""
    _, role, attempt, transfer_id = name.split(":", 3)
    return Key(Role(role), transfer_id, int(attempt))
