"""The words both sides use for where a transfer is. Numbers are SGLang's poll values."""

from enum import IntEnum, StrEnum


class State(IntEnum):
    """Where a transfer is, on either side. Success means committed, not released."""

    FAILED = 0
    BOOTSTRAPPING = 1  # the other side has not answered yet
    WAITING_FOR_INPUT = 2  # it has, and there is nothing to move yet
    TRANSFERRING = 3
    SUCCESS = 4


TERMINAL = frozenset({State.FAILED, State.SUCCESS})


class StallReason(StrEnum):
    """Why a live transfer does not move right now."""

    WAITING_FOR_SOURCE = "waiting_for_source"  # the source daemon does not know the transfer yet
    WAITING_FOR_INPUT = "waiting_for_input"  # the source worker has made nothing more ready
    WAITING_FOR_BLOCKS = "waiting_for_blocks"  # the pool has none for this role
    WAITING_FOR_RESUME = "waiting_for_resume"  # the window is full; its consumer must take over
    WAITING_FOR_PEER = "waiting_for_peer"  # the other daemon does not answer
    DRAINING = "draining"  # ended, but someone may still touch its blocks

    __hash__ = str.__hash__  # as above; it is looked up at every change of a transfer


class Role(StrEnum):
    """Which end of a transfer this is."""

    SOURCE = "source"
    SINK = "sink"


class Mode(StrEnum):
    """How a sink worker takes its tokens over."""

    CONSUME = "consume"  # a bounded window slides along with `resume`
    WHOLE = "whole"  # one window of `max_tokens`, reserved before anything moves
