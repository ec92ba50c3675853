"""The NIXL agent of one pool: only the poller's thread touches it, since agents are not for two.

Facts of NIXL 1.5.1 that this rests on: over some of UCX's ways a read is done when ``transfer``
returns, and the GIL is free meanwhile; a peer that dies ends its reads with an exception; one that
is stopped leaves them under way for as long; a handle that is released while it is under way proves
nothing (nixl#2067), so it is kept until it has ended.
"""

from __future__ import annotations

import importlib
import logging
import secrets
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from kvferry_proto.offer import HOST, POOL_BLOCKS_MAX, PoolFrame, Runs

log = logging.getLogger(__name__)


class Memory(NamedTuple):
    """A pool's memory. ``device``: HOST, or a CUDA device's index and one."""

    address: int
    block_bytes: int
    blocks: int
    owner: object  # kept alive as long as it is registered
    device: int = HOST


class NixlFailed(Exception):
    """NIXL says no; the message is its own."""


class NixlMissing(NixlFailed):
    """It is not installed."""


def load() -> Any:
    """Load NIXL; raise NixlFailed with the reason if that cannot be."""
    try:
        api = importlib.import_module("nixl._api")
    except (ImportError, OSError) as error:
        raise NixlFailed(f"nixl cannot be loaded: {error}") from error
    theirs = logging.getLogger("nixl")
    for handler in list(theirs.handlers):
        if type(handler) is logging.StreamHandler:  # it writes to stdout, which is ours
            theirs.removeHandler(handler)
    theirs.propagate = True
    theirs.setLevel(logging.WARNING)
    return api


def has_loaded_nixl() -> bool:
    """Whether NIXL's libraries are in this process."""
    return "nixl._api" in sys.modules


def errors_of(api: Any) -> tuple[type[Exception], ...]:
    """What NIXL raises: each of its errors is a class of its own, without a base of theirs."""
    found = [one for one in vars(api.nixlBind).values() if isinstance(one, type)]
    # And what its bindings and numpy raise for what a pool elsewhere says of itself.
    ours = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError)
    return (*ours, *(one for one in found if issubclass(one, Exception)))


class Reading(NamedTuple):
    """A read under way; ``failed``: it is known already that it will not end well."""

    number: int
    failed: str = ""


class _Remote(NamedTuple):
    """A pool elsewhere, and the connections that name it."""

    frame: PoolFrame
    name: str
    blocks: Any
    users: set[object]


class PoolAgent:
    """Registers one pool, and reads whole blocks of others into it."""

    def __init__(self, memory: Memory, number: int) -> None:
        """Raises NixlFailed."""
        import numpy

        self._numpy = numpy
        self._memory = memory
        self._remotes: dict[bytes, _Remote] = {}
        self._handles: dict[int, Any] = {}  # of reads under way, by number
        self._numbers = 0
        if memory.blocks > POOL_BLOCKS_MAX:
            raise NixlFailed(f"a pool of {memory.blocks} blocks; {POOL_BLOCKS_MAX} at most")
        api = load()
        self._errors = errors_of(api)
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._agent = api.nixl_agent(f"kvferry-{secrets.token_hex(8)}", config)
            size_bytes = memory.block_bytes * memory.blocks
            region = (memory.address, size_bytes, max(0, memory.device - 1), "pool")
            self._region = self._agent.register_memory([region], _kind(memory.device))
            self._blocks = self._list("", memory)
            metadata = self._agent.get_agent_metadata()
        except self._errors as error:
            raise NixlFailed(str(error) or type(error).__name__) from error
        self.frame = PoolFrame(
            number,
            memory.device,
            memory.address,
            memory.block_bytes,
            memory.blocks,
            metadata,
        )

    def _list(self, agent: str, memory: Memory | PoolFrame) -> Any:
        """One descriptor a block, made once for all reads."""
        numpy = self._numpy
        rows = numpy.empty((memory.blocks, 3), dtype=numpy.uint64)
        rows[:, 0] = memory.address + numpy.arange(memory.blocks) * memory.block_bytes
        rows[:, 1] = memory.block_bytes
        rows[:, 2] = max(0, memory.device - 1)
        return self._agent.prep_xfer_dlist(agent, rows, _kind(memory.device))

    def meet(self, user: object, pool: PoolFrame) -> None:
        """A connection may read from this pool from now on; raises NixlFailed."""
        known = self._remotes.get(pool.metadata)
        if known is not None:
            if known.frame != pool:
                raise NixlFailed("a pool that is known was shown otherwise")
            known.users.add(user)
            return
        if pool.block_bytes != self._memory.block_bytes:
            raise NixlFailed(
                f"its blocks have {pool.block_bytes} bytes, ours {self._memory.block_bytes}"
            )
        try:
            name = self._agent.add_remote_agent(pool.metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            try:
                blocks = self._list(name, pool)
            except self._errors:
                self._agent.remove_remote_agent(name)
                raise
        except self._errors as error:
            raise NixlFailed(str(error) or type(error).__name__) from error
        self._remotes[pool.metadata] = _Remote(pool, name, blocks, {user})

    def part(self, user: object) -> None:
        """A connection is over."""
        for metadata, remote in list(self._remotes.items()):
            remote.users.discard(user)
            if not remote.users:
                del self._remotes[metadata]
                remote.blocks.release()
                self._agent.remove_remote_agent(remote.name)

    def begin(self, pool: PoolFrame, theirs: Runs, ours: Runs) -> Reading:
        """Read blocks; ``is_done`` tells the end. Raises NixlFailed: nothing was begun."""
        try:
            remote = self._remotes[pool.metadata]
            handle = self._agent.make_prepped_xfer(
                "READ", self._blocks, self._indices(ours), remote.blocks, self._indices(theirs)
            )
        except self._errors as error:
            raise NixlFailed(str(error) or type(error).__name__) from error
        self._numbers += 1
        self._handles[self._numbers] = handle
        try:
            state = self._agent.transfer(handle)
        except self._errors as error:  # some of its blocks may be under way all the same
            return Reading(self._numbers, str(error) or type(error).__name__)
        return Reading(self._numbers, "the read could not be begun" if state == "ERR" else "")

    def is_done(self, reading: Reading) -> bool:
        """Whether a read has ended well.

        Raises NixlFailed if it will not: some of its blocks may still be under way then, and only
        ``close`` ends them for certain.
        """
        if reading.failed:
            raise NixlFailed(reading.failed)
        handle = self._handles[reading.number]
        try:
            state = self._agent.check_xfer_state(handle)
            if state == "DONE":
                del self._handles[reading.number]
                handle.release()
        except self._errors as error:
            raise NixlFailed(str(error) or type(error).__name__) from error
        if state == "ERR":
            raise NixlFailed("the read has failed")
        return bool(state == "DONE")

    def serve(self) -> None:
        """Let reads of others go on: without hardware they are served by this very call."""
        self._agent.get_new_notifs()

    def close(self) -> None:
        """End every read of ours and of others here: with the last reference the agent is gone."""
        try:
            for handle in self._handles.values():
                self._quietly(handle.release)
            for remote in self._remotes.values():
                self._quietly(remote.blocks.release)
                self._quietly(partial(self._agent.remove_remote_agent, remote.name))
            self._quietly(self._blocks.release)
            self._quietly(partial(self._agent.deregister_memory, self._region))
        finally:
            self._handles.clear()
            self._remotes.clear()
            del self._blocks, self._region, self._agent

    def _quietly(self, step: Callable[[], object]) -> None:
        """One step that fails must not keep the others from being made."""
        try:
            step()
        except self._errors as error:
            log.warning("closing a NIXL agent: %s", error)

    def _indices(self, runs: Runs) -> Any:
        numpy = self._numpy
        return numpy.concatenate([numpy.arange(first, first + count) for first, count in runs])


def _kind(device: int) -> str:
    return "DRAM" if device == HOST else "VRAM"
