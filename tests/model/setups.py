"""The worlds that are walked through: what is in them, and what may go wrong.

Loss, doubling and any order of messages may always happen, and so may cuts unless said otherwise.
"""

from model.state import Mutant, Setup

# Walked in every test run.
SMALL = (
    Setup("three windows", tokens=3),
    Setup("three windows, crowded network", tokens=3, bag=3, cuts=False),
    Setup("the total known from the start", tokens=3, late_total=False),
    Setup("blocks of two tokens, part full at the end", tokens=3, block_tokens=2, sink_pool=2, bag=1),
    Setup("two connections", tokens=2, lines=2, sink_pool=2, window=2, bag=1),
    Setup("retry in the same blocks", tokens=2, attempts=2, bag=1),
    Setup("retry in other blocks", tokens=1, attempts=2, sink_pool=2, source_pool=2, bag=1),
    Setup("the sink's daemon crashes", tokens=3, sink_crashes=1, bag=1),
    Setup("the source's daemon crashes", tokens=3, source_crashes=1, bag=1),
    Setup("both daemons crash", tokens=2, sink_crashes=1, source_crashes=1, bag=1),
    Setup("both workers die", tokens=2, sink_dies=True, source_dies=True, bag=1),
    Setup(
        "retry, a dead worker and a crash",
        tokens=1, attempts=2, sink_crashes=1, sink_dies=True, bag=1, cuts=False,
    ),
)  # fmt: skip

# Walked by `make model`: minutes.
LARGE = (
    Setup("three windows on two connections", tokens=3, lines=2, sink_pool=2, window=2, bag=1),
    Setup("two connections, other blocks", tokens=2, lines=2, sink_pool=2, source_pool=2, window=2, bag=1),
    Setup("retry with two windows in other blocks", tokens=2, attempts=2, sink_pool=2, source_pool=2, bag=1),
    Setup("retry and both daemons crash", tokens=1, attempts=2, sink_crashes=1, source_crashes=1, bag=1),
    Setup("each daemon crashes twice", tokens=2, sink_crashes=2, source_crashes=2, bag=1),
    Setup("retry, crash and cuts", tokens=1, attempts=2, sink_crashes=1, sink_pool=2, bag=1),
)  # fmt: skip

_TWO_LINES = Setup("", tokens=2, lines=2, sink_pool=2, source_pool=2, window=2, bag=1)
_RETRY = Setup("", tokens=2, attempts=2, bag=1)
_SINK_CRASH = Setup("", tokens=3, sink_crashes=1, bag=1)
_SOURCE_CRASH = Setup("", tokens=3, source_crashes=1, bag=1)
_RETRY_CRASH = Setup(
    "", tokens=1, attempts=2, sink_crashes=1, sink_dies=True, bag=1, cuts=False, sink_pool=2
)
# Where each mistake shows.
SHOWS: dict[Mutant, Setup] = {
    Mutant.FREE_ON_SEND: Setup("", tokens=3),
    Mutant.ACK_BEFORE_LEDGER: _SINK_CRASH,
    Mutant.ACK_HIGHEST: _TWO_LINES,
    Mutant.SILENT_DUPLICATE: Setup("", tokens=2, cuts=False),
    Mutant.DOUBLE_RESUME: Setup("", tokens=3, block_tokens=2, sink_pool=2, bag=1),
    Mutant.UNBOUND_CLAIM: _TWO_LINES,
    Mutant.OLD_CHUNK: _RETRY,
    Mutant.RESUME_BY_BLOCK: Setup("", tokens=3),
    Mutant.QUARANTINE_TIMER: _RETRY,
    Mutant.NO_DRAIN: _RETRY,
    Mutant.INHERIT: _RETRY,
    Mutant.DONE_ONCE: Setup("", tokens=2),
    Mutant.DONE_BEFORE_LEDGER: _SINK_CRASH,
    Mutant.NOTED_BEFORE_LEDGER: _SOURCE_CRASH,
    Mutant.OLD_UNKNOWN: Setup("", tokens=2, bag=3, cuts=False),
    Mutant.QUARANTINE_FORGOTTEN: _RETRY_CRASH,
    Mutant.UNFLOORED_RESUME: Setup("", tokens=3, block_tokens=2, sink_pool=2, bag=1),
}
