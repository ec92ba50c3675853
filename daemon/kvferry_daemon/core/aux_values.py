"""Aux values are payload: what may be said of them in words."""

from kvferry_daemon.core.transfer import Aux


def difference(before: Aux | None, now: Aux | None) -> str:
    """Which values are others now, by their names; what they are is nobody's business."""
    old, new = before or {}, now or {}
    names = sorted(name for name in old | new if old.get(name) != new.get(name))
    return "aux is not what it was before" + (f": {', '.join(names)}" if names else "")
