"""Figures of several rounds: a median and its range."""

import statistics
from collections.abc import Iterable
from typing import Any


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    ordered = sorted(values)
    found = {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1]}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def rates(total_bytes: int, seconds: Iterable[float]) -> dict[str, float]:
    """GB/s."""
    return spread(total_bytes / one / 1e9 for one in seconds)


def ratios(ours: Iterable[float], theirs: Iterable[float]) -> dict[str, float]:
    """One figure to the other, round by round: what a noisy machine does to both cancels out."""
    return spread(one / other for one, other in zip(ours, theirs, strict=True))


def absent(reason: str) -> dict[str, Any]:
    """What stands where nothing could be measured. Never a zero."""
    return {"absent": reason}
