"""Which daemon this is: the one whose ledger lies here, in its next life, or a new one."""

import logging
import os
import secrets
import sqlite3
import stat
from dataclasses import dataclass
from pathlib import Path

from kvferry_daemon.config import Config
from kvferry_daemon.core import outside as out
from kvferry_daemon.core.events import Timing
from kvferry_daemon.core.node import Node
from kvferry_daemon.core.past import LedgerWrong, Past
from kvferry_daemon.core.records import HOST, DaemonRecord, PoolRecord
from kvferry_daemon.core.settings import Settings
from kvferry_daemon.core.tenants import ALL, pool_id_of, tenant_in, uid_in
from kvferry_daemon.ledger import rows_of
from kvferry_daemon.runtime_dir import POOLS, RuntimeDir

DAEMON = "daemon"  # the name of the row that says so
FORMAT = 4  # of the ledger; another one is not read
MACHINE_BOOT = Path("/proc/sys/kernel/random/boot_id")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Life:
    """One run of the daemon; ``past`` is what the run before left, if it left a good ledger."""

    daemon_id: str
    number: int
    past: Past | None
    peer_port: int  # of the run before; 0: none
    directory: int

    def record(self, peer_port: int) -> DaemonRecord:
        """How the ledger names it."""
        return DaemonRecord(
            format=FORMAT,
            daemon_id=self.daemon_id,
            life=self.number,
            machine_boot=machine_boot(),
            directory=self.directory,
            peer_port=peer_port,
        )


def begin(directory: RuntimeDir, config: Config, now_s: float) -> Life:
    """Read the ledger, if there is one. One that cannot be trusted is set aside, with its pools.

    A pool whose file is not what the ledger says is lost alone: its workers may write that file.
    """
    past = None
    if directory.ledger.exists():
        try:
            past = _read(directory, config, now_s)
        except (LedgerWrong, sqlite3.Error, ValueError, OSError) as error:
            kept = directory.set_ledger_aside()
            log.error("beginning anew, the ledger cannot be used (kept as %s): %s", kept, error)
    if past is None or past.daemon is None:
        directory.sweep_pools(keep=set())
        return Life(secrets.token_hex(16), 1, None, 0, directory.number)
    for pool_id, why in past.lost.items():
        log.error("pool %s is lost: %s; %s may write it", pool_id, why, _who_may_write(pool_id))
    directory.sweep_pools(keep={pool.pool_id for pool in past.pools} - past.lost.keys())
    before = past.daemon
    return Life(before.daemon_id, before.life + 1, past, before.peer_port, directory.number)


def _read(directory: RuntimeDir, config: Config, now_s: float) -> Past | None:
    past = Past()
    for name, body in sorted(rows_of(directory.ledger), key=lambda row: row[0] != DAEMON):
        past.add(name, body)
        if past.daemon is not None and past.daemon.format != FORMAT:  # its rows are read otherwise
            raise LedgerWrong(f"its format is {past.daemon.format}, not {FORMAT}")
    if past.daemon is None:
        raise LedgerWrong("it does not say whose it is")
    if past.daemon.machine_boot != machine_boot():
        raise LedgerWrong("the machine was started anew since")
    if past.daemon.directory != directory.number:
        raise LedgerWrong("it is of a daemon in another runtime directory, or was copied with it")
    past.check()
    for pool in past.pools:
        tenant = tenant_in(pool.pool_id)
        if (tenant == ALL) != (config.tenant == "off"):
            raise LedgerWrong(f"tenant is {config.tenant} now, and was otherwise")
        try:
            uid_in(pool.pool_id)
        except ValueError as error:
            raise LedgerWrong(str(error)) from error
        if pool.device != HOST:
            continue  # lost; nothing of it lies here
        if pool_id_of(pool.layout, tenant) != pool.pool_id:
            raise LedgerWrong(f"pool {pool.pool_id} has another layout")
        why = _what_is_wrong(directory.pools / pool.pool_id, pool)
        if why:
            past.lost[pool.pool_id] = why
    settings = settings_of(config, "", past.daemon.daemon_id, past.daemon.life + 1)
    trial = Node(settings, lambda: secrets.token_bytes(32), 0, now_s)
    trial.handle(out.Restored(past), now_s)  # raises LedgerWrong for what does not fit together
    return past


def _what_is_wrong(path: Path, pool: PoolRecord) -> str:
    """Why a file cannot be the pool of the life before; empty: it can."""
    size = pool.blocks * pool.layout.block_bytes
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return "its file is missing"
    if not stat.S_ISREG(facts.st_mode):
        return "it is no file"
    return "" if facts.st_size == size else f"its file has {facts.st_size} bytes, not {size}"


def _who_may_write(pool_id: str) -> str:
    uid = uid_in(pool_id)
    return "every worker" if uid is None else f"uid {uid}"


def settings_of(config: Config, peer_address: str, daemon_id: str, life: int) -> Settings:
    """The part of the config that the node works with, for one life of the daemon."""
    deadlines = config.deadlines.model_dump(exclude={"stop_s", "deadline_max_s"})
    return Settings(
        boot_id=secrets.token_hex(16),
        daemon_id=daemon_id,
        life=life,
        pools_dir=str(config.runtime_dir / POOLS),
        peer_address=peer_address,
        timing=Timing(**deadlines),
        window_tokens=config.window_tokens,
        budget_bytes=int(config.budget_bytes),
        pool_tokens=config.pool_tokens,
        source_share=config.source_share,
        streams=config.streams,
        chunk_bytes=int(config.chunk_bytes),
        transfers_max=config.transfers_max,
        workers_max=config.workers_max,
        worker_transfers_max=config.worker_transfers_max,
        deadline_max_s=config.deadline_max_s,
        device=config.device,
        tenancy=config.tenant,
        tenant_budget_bytes=config.tenant_budget_bytes,
        traced=config.otlp_endpoint is not None,
    )


def machine_boot() -> str:
    """A name of the machine's present run; its monotonic clock goes on exactly as long."""
    try:
        return MACHINE_BOOT.read_text().strip()
    except OSError:
        return f"unknown-{os.uname().nodename}"
