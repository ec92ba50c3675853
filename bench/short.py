"""The same parts at their smallest: whether everything works, in a fraction of a minute."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench import (
    board,
    engines,
    gpu,
    handoff,
    live,
    messages,
    paged,
    pieces,
    pool,
    replayed,
    waiting,
    windows,
)
from bench.payload import llama
from bench.windows import Case

LAYOUT = llama(heads=1, block_size_tokens=16, layers=2)
CASES = {
    "llama_8192": Case(LAYOUT, 256, (64,)),
    "quarter_32768": Case(LAYOUT, 512, (128,)),
}
AT_ONCE = Case(LAYOUT, 256, ())

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "pieces": partial(pieces.measure, 4 << 20, (64 << 10, 1 << 20), 1),
    "windows": partial(windows.measure, CASES, 1),
    "at_once": partial(windows.measure_at_once, AT_ONCE, (1, 8), 1),
    "handoff": partial(handoff.measure, LAYOUT, 256, 1),
    "reading": partial(handoff.measure_reading, LAYOUT, 256, 1),
    "paged": paged.measure,
    "gpu": gpu.measure,
    "messages": partial(messages.measure, 1, 100, 100),
    "board": board.measure,
    "live": partial(live.measure, (10, 100), 1, 100, 1, 50),
    "allocator": partial(pool.measure, 100, 1),
    "start": partial(waiting.measure_start, 1),
    "waiting": partial(waiting.measure, 10, 20, 0.5, 0.5),
    "engines": partial(engines.none, "engines take minutes to start"),
    "replay": replayed.measure,
}
