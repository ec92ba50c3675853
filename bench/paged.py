"""Gather and scatter between an engine's paged cache and a window, where there is a GPU."""

from typing import Any

from bench.figures import absent


def measure() -> dict[str, Any]:
    """On the current CUDA device; without one, the reason."""
    import torch  # not above: the other parts do without, and it takes seconds

    if not torch.cuda.is_available():
        return absent("no CUDA device")
    from bench.paged_device import measure_on

    return measure_on(torch.device("cuda", torch.cuda.current_device()))
