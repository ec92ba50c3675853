"""Every error that crosses a socket: a stable code, whose fault it is, and what to do.

Codes are part of the wire: add, never rename. The message of an error names what was seen and
what was expected; the remedy of its code says what usually helps.
"""

from enum import StrEnum
from typing import NamedTuple

AGAIN_S = 1.0


class Fault(StrEnum):
    """Who has to act."""

    CALLER = "caller"
    PEER = "peer"
    OPERATOR = "operator"
    US = "us"


class Code(StrEnum):
    """Stable names of everything that can go wrong."""

    BAD_MESSAGE = "bad_message"
    NO_COMMON_VERSION = "no_common_version"
    HELLO_FIRST = "hello_first"
    UNKNOWN_SESSION = "unknown_session"
    WORKER_NOT_LOCKED = "worker_not_locked"
    UNKNOWN_TRANSFER = "unknown_transfer"
    NOT_YOUR_TRANSFER = "not_your_transfer"
    STALE_ATTEMPT = "stale_attempt"
    PARAMETERS_DIFFER = "parameters_differ"
    RESUME_AHEAD = "resume_ahead"
    READY_BEYOND_WINDOW = "ready_beyond_window"
    TOTAL_CHANGED = "total_changed"
    TOTAL_TOO_SMALL = "total_too_small"
    AUX_MISSING = "aux_missing"
    AUX_CHANGED = "aux_changed"
    BAD_RANK = "bad_rank"
    RANK_TAKEN = "rank_taken"
    RANK_MISSING = "rank_missing"
    GROUP_DIFFERS = "group_differs"
    SINK_TAKEN = "sink_taken"
    BAD_DEADLINE = "bad_deadline"
    TOTAL_MISMATCH = "total_mismatch"
    START_UNALIGNED = "start_unaligned"
    START_MISMATCH = "start_mismatch"
    BAD_ADDRESS = "bad_address"
    WINDOW_TOO_LARGE = "window_too_large"
    MAX_TOKENS_EXCEEDED = "max_tokens_exceeded"
    LAYOUT_MISMATCH = "layout_mismatch"
    PAYLOAD_MISMATCH = "payload_mismatch"
    POOL_REFUSED = "pool_refused"
    POOL_UNREACHABLE = "pool_unreachable"
    POOL_LOST = "pool_lost"
    DEVICE_FAILED = "device_failed"
    DEVICE_ONLY = "device_only"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    DRAINING = "draining"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_PROTOCOL = "peer_protocol"
    NOT_TRUSTED = "not_trusted"
    TRANSPORT_UNAVAILABLE = "transport_unavailable"
    ENCRYPTION_DIFFERS = "encryption_differs"
    SOURCE_LOST = "source_lost"
    SOURCE_FAILED = "source_failed"
    SINK_FAILED = "sink_failed"
    LEASE_EXPIRED = "lease_expired"
    STALLED = "stalled"
    ABORTED = "aborted"
    RELEASED_EARLY = "released_early"
    SUPERSEDED = "superseded"
    WORKER_LOST = "worker_lost"
    DAEMON_RESTARTED = "daemon_restarted"
    DAEMON_UNREACHABLE = "daemon_unreachable"
    CONTROL_DENIED = "control_denied"
    DIRECTORY_REFUSED = "directory_refused"
    BAD_ARRAY = "bad_array"
    BAD_BLOCK_TABLE = "bad_block_table"
    BAD_CACHE = "bad_cache"
    ENGINE_UNSUPPORTED = "engine_unsupported"
    CLIENT_CLOSED = "client_closed"
    INTERNAL = "internal"


class Advice(NamedTuple):
    """What a code means for the reader of the error."""

    fault: Fault
    remedy: str


_C, _P, _O, _U = Fault.CALLER, Fault.PEER, Fault.OPERATOR, Fault.US
ADVICE: dict[Code, Advice] = {
    Code.BAD_MESSAGE: Advice(_C, "send one msgpack map a frame, as WIRE.md has it"),
    Code.NO_COMMON_VERSION: Advice(_O, "upgrade the older of the two"),
    Code.HELLO_FIRST: Advice(_C, "say hello on this connection, then repeat the call"),
    Code.UNKNOWN_SESSION: Advice(_C, "say hello without a session; earlier transfers are gone"),
    Code.WORKER_NOT_LOCKED: Advice(_C, "hold a flock on the named file before saying hello"),
    Code.UNKNOWN_TRANSFER: Advice(_C, "open it with send or receive; check id, attempt and role"),
    Code.NOT_YOUR_TRANSFER: Advice(_C, "use the session that opened the transfer"),
    Code.STALE_ATTEMPT: Advice(_C, "a newer attempt runs; give this one up and release it"),
    Code.PARAMETERS_DIFFER: Advice(_C, "repeat a call unchanged, or use a higher attempt"),
    Code.RESUME_AHEAD: Advice(_C, "resume at most at sent_tokens"),
    Code.READY_BEYOND_WINDOW: Advice(_C, "wait until poll shows a window that reaches so far"),
    Code.TOTAL_CHANGED: Advice(_C, "total_tokens is told once; start a higher attempt"),
    Code.TOTAL_TOO_SMALL: Advice(_C, "total_tokens counts every token from 0, ready ones included"),
    Code.AUX_MISSING: Advice(
        _C, "tell every aux value of the layout no later than with the last ready"
    ),
    Code.AUX_CHANGED: Advice(_C, "aux values are told once; start a higher attempt"),
    Code.BAD_RANK: Advice(_C, "ranks count from 0 to world_size - 1"),
    Code.RANK_TAKEN: Advice(
        _C, "give each worker of a group its own rank; one started again uses attempt + 1"
    ),
    Code.RANK_MISSING: Advice(
        _C, "open every rank at this one daemon, no later than stall_s after the first"
    ),
    Code.GROUP_DIFFERS: Advice(_C, "open every rank of a group with the same parameters"),
    Code.SINK_TAKEN: Advice(
        _C, "receive an attempt at one daemon only, with all ranks of its group"
    ),
    Code.BAD_DEADLINE: Advice(_C, "ask for one within the limits, or have deadline_max_s raised"),
    Code.TOTAL_MISMATCH: Advice(_C, "all ranks of a group must have the same number of tokens"),
    Code.START_UNALIGNED: Advice(_C, "start_tokens must be a multiple of block_size_tokens"),
    Code.START_MISMATCH: Advice(_C, "let both sides start where the sink's prefix ends"),
    Code.BAD_ADDRESS: Advice(
        _C, "give the source as its daemon announces it: tcp://host:port, or with ?key="
    ),
    Code.WINDOW_TOO_LARGE: Advice(_C, "ask for a smaller window, or give the pool more memory"),
    Code.MAX_TOKENS_EXCEEDED: Advice(_C, "name a larger max_tokens, or use consume mode"),
    Code.LAYOUT_MISMATCH: Advice(
        _C,
        "run both engines with one model and dtype, on ranks and block sizes that divide each other",
    ),
    Code.PAYLOAD_MISMATCH: Advice(
        _C, "send both engines the same request, of one model; or name the model alike on both"
    ),
    Code.POOL_REFUSED: Advice(
        _O, "raise the memory budget, or what backs it, or shrink the window"
    ),
    Code.POOL_UNREACHABLE: Advice(
        _O,
        "let daemon and worker see one runtime directory; for a pool in a GPU the same GPU, too, in "
        "one PID and IPC namespace, or use device=host",
    ),
    Code.POOL_LOST: Advice(
        _O,
        "its memory ended with its daemon's life, or its file was cut; use attempt + 1 on both sides",
    ),
    Code.DEVICE_FAILED: Advice(
        _O, "see the log; connect again and use attempt + 1, or restart what the message names"
    ),
    Code.DEVICE_ONLY: Advice(
        _C, "use torch_runs, gather or scatter; numpy_runs needs a daemon with device=host"
    ),
    Code.RESOURCE_EXHAUSTED: Advice(
        _C, "end transfers or sessions or ask less often, then try again"
    ),
    Code.DRAINING: Advice(_O, "the daemon is stopping; use another node"),
    Code.PEER_UNREACHABLE: Advice(_O, "check the source's address, its daemon and the network"),
    Code.PEER_PROTOCOL: Advice(_P, "the other daemon broke the protocol; compare the versions"),
    Code.NOT_TRUSTED: Advice(_O, "let both daemons trust each other's keys: kvferry keys trust"),
    Code.TRANSPORT_UNAVAILABLE: Advice(
        _O, "install the same NIXL on both ends, or set transport to auto on both"
    ),
    Code.ENCRYPTION_DIFFERS: Advice(_O, "set payload_encryption alike on both daemons"),
    Code.SOURCE_LOST: Advice(_P, "the source daemon forgot the transfer; try attempt + 1"),
    Code.SOURCE_FAILED: Advice(_P, "see the source's own error; try attempt + 1"),
    Code.SINK_FAILED: Advice(_P, "see the sink's own error; try attempt + 1"),
    Code.LEASE_EXPIRED: Advice(_P, "the sink daemon fell silent; try attempt + 1"),
    Code.STALLED: Advice(_C, "the message names what it waited for; try attempt + 1"),
    Code.ABORTED: Advice(_C, "a worker gave the transfer up"),
    Code.RELEASED_EARLY: Advice(_C, "mark all tokens ready and tell total_tokens before release"),
    Code.SUPERSEDED: Advice(_C, "a higher attempt took over; release this one"),
    Code.WORKER_LOST: Advice(_C, "start the worker again and use attempt + 1"),
    Code.DAEMON_RESTARTED: Advice(_O, "open the transfer again with attempt + 1 on both sides"),
    Code.DAEMON_UNREACHABLE: Advice(_O, "start the daemon, or check the runtime directory"),
    Code.CONTROL_DENIED: Advice(
        _O, "run the command as the daemon's user, as root, or with its operator_group (sg GROUP)"
    ),
    Code.DIRECTORY_REFUSED: Advice(
        _O, "name the daemon's own runtime directory, or have what lies in its place removed"
    ),
    Code.BAD_ARRAY: Advice(_C, "give each plane's dtype and shape, the same tokens of every plane"),
    Code.BAD_BLOCK_TABLE: Advice(
        _C, "name a block of the cache for every token up to the last one copied"
    ),
    Code.BAD_CACHE: Advice(
        _C, "use a cache of one sequence, with room for all its tokens, that keeps nothing else"
    ),
    Code.ENGINE_UNSUPPORTED: Advice(_O, "install a version of the engine that the message names"),
    Code.CLIENT_CLOSED: Advice(_C, "connect again, in the process that uses it"),
    Code.INTERNAL: Advice(_U, "report it with the daemon's log"),
}


class FerryError(Exception):
    """An error with a stable ``code``; ``str()`` is code, message and remedy in one line.

    ``retry_after_s``: when to try again may help; None: time alone changes nothing.
    """

    def __init__(self, code: Code, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def fault(self) -> Fault:
        """Whose fault it is: caller, peer, operator or us."""
        return ADVICE[self.code].fault

    @property
    def remedy(self) -> str:
        """What usually helps."""
        return ADVICE[self.code].remedy

    def __str__(self) -> str:
        message = " ".join(self.message.splitlines())  # it may come from a peer
        return f"{self.code}: {message} ({self.remedy})"


def exhausted(message: str, retry_after_s: float = AGAIN_S) -> FerryError:
    """Refuse what is over a bound that others may make room under."""
    return FerryError(Code.RESOURCE_EXHAUSTED, message, retry_after_s)
