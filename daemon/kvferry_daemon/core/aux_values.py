"""Aux values are payload, and may be large: what is kept of them, and what may be said of them."""

from hashlib import sha256

from kvferry_daemon.core.transfer import Aux

DIGEST_BYTES = 16


def digest_of(aux: Aux | None) -> bytes | None:
    """What tells values from others once they are not kept any more."""
    if aux is None:
        return None
    return sha256(repr(sorted(aux.items())).encode()).digest()[:DIGEST_BYTES]


def difference(before: Aux | None, now: Aux | None) -> str:
    """Which values are others now, by their names; what they are is nobody's business."""
    names = []
    if before is not None and now is not None:
        names = sorted(name for name in before | now if before.get(name) != now.get(name))
    return "aux is not what it was before" + (f": {', '.join(names)}" if names else "")
