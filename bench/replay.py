"""`python -m bench.replay --trace FILE`: an hour of real requests, and the memory they need.

FILE has a JSON object a line: ``timestamp`` (ms), ``input_length``, ``output_length`` (tokens) and
``hash_ids``, one for each 512-token block of the prompt; equal ids are a shared prefix. What is
computed, moved and taken over when stands in `bench.replay_plan`: its `Model` is the options here.
A token is 32 bytes, where one of a large model is 128 KiB or more, so that all fits into memory.

The trace is played in consume mode with ``--sink-tokens`` of memory at the sink; then in whole mode,
where every payload gets all its blocks at its first token, with 1, 2, 4, ... times as much, until
that is as good in the 99th percentile of lag or no transfer waits for memory any more. All runs
move the same tokens at the same times. Whole mode is treated well: its decode copies while tokens
come, too, and gives the blocks back as soon as the last one has been copied.

What is compared is the memory in which payloads wait to be copied. The memory that they are copied
to is the engine's own, and as large either way.

A faster replay asks more of the windows: a sink must hold what comes in a round trip of messages,
which is ``speed`` times as much of the trace. Whole payloads are held while they are computed, which
scales with the trace. So where windows win here, they win by more at the trace's own speed.

The default, 500 requests, takes 3 minutes, and p99 is then the fifth largest lag. The whole hour
(``--requests 0``) takes 12 minutes a run, of which there are four or so; half of that at
``--speed 10``, which two cores can bear if nobody else wants them.

One JSON object on stdout, a table on stderr; the exit status is 1 if anything failed. Its keys:

- ``machine``, ``model``; ``trace``: requests, ``input_tokens``, ``skipped_tokens`` (prefixes that did
  not move), ``moved_tokens``, ``largest_tokens`` (of one payload), ``planned_seconds``.
- ``runs``, each with ``mode``, ``sink_tokens``, ``finished`` requests, ``verified_tokens`` (every byte
  of them compared), ``seconds``, and in seconds and milliseconds of the clock, not of the trace:
  ``lag_ms`` from the moment when prefill had computed a payload's last token to the moment when the
  decode worker saw Success; ``taken_ms`` from there to when everything was copied and released;
  ``stall_s`` of all transfers by reason, as the decode workers' polls saw it; ``source`` and ``sink``
  with ``pool_tokens``, ``peak_tokens`` and ``mean_tokens`` of blocks not free (from the control
  socket, every 50 ms), ``cpu_ms_a_request`` of the daemon; ``failures`` in words.
- ``same_p99``: ``consume_tokens``, and ``whole_tokens``: the least that was tried with a p99 of lag not
  more than a tenth above, or for which no transfer waited, so that more memory is of no use; None if
  none was. ``times``: how many times as much that is.
- ``violations``: what must not be, in words.
"""

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

from bench.replay_plan import Job, Model, Request, plan, read_trace
from bench.replay_run import run
from bench.replay_worker import LAYOUT
from kvferry_proto.states import Mode

REQUESTS = 500
SINK_TOKENS = 16_384
SOURCE_TOKENS = 1 << 24  # room for everything; a peak that comes near it would say otherwise
TIMES = (1, 2, 4, 8, 16, 32, 64)
SAME = 1.1
WAITED = "waiting_for_blocks"


def say(words: str) -> None:
    """A line for who waits."""
    print(words, file=sys.stderr, flush=True)


def measure(requests: list[Request], model: Model, sink_tokens: int) -> dict[str, Any]:
    """Consume mode once, and whole mode with more and more memory."""
    jobs = plan(requests, model.prefix_blocks)
    size = LAYOUT.block_size_tokens
    sink_tokens = -(-max(sink_tokens, model.window_tokens) // size) * size
    largest_tokens = max(job.moved_tokens for job in jobs)
    source_tokens = min(SOURCE_TOKENS, sum(job.moved_tokens + size for job in jobs))
    first = run(jobs, model, Mode.CONSUME, source_tokens, sink_tokens)
    say(row(first))
    runs, whole_tokens = [first], None
    for times in TIMES:
        tokens = times * sink_tokens
        if tokens < largest_tokens:
            say(f"whole    {tokens:>10}  too small for a payload of {largest_tokens} tokens")
            continue
        runs.append(run(jobs, model, Mode.WHOLE, source_tokens, tokens))
        say(row(runs[-1]))
        is_same = runs[-1]["lag_ms"]["p99"] <= SAME * first["lag_ms"]["p99"]
        if is_same or WAITED not in runs[-1]["stall_s"]:
            whole_tokens = tokens
            break
    return {
        "model": dataclasses.asdict(model),
        "trace": of_trace(jobs, model),
        "runs": runs,
        "same_p99": {
            "consume_tokens": sink_tokens,
            "whole_tokens": whole_tokens,
            "times": whole_tokens and whole_tokens // sink_tokens,
        },
        "violations": [words for one in runs for words in violations(one, jobs)],
    }


def of_trace(jobs: list[Job], model: Model) -> dict[str, Any]:
    """What is played."""
    return {
        "requests": len(jobs),
        "input_tokens": sum(job.total_tokens for job in jobs),
        "skipped_tokens": sum(job.start_tokens for job in jobs),
        "moved_tokens": sum(job.moved_tokens for job in jobs),
        "largest_tokens": max(job.moved_tokens for job in jobs),
        "planned_seconds": round(jobs[-1].at_s / model.speed, 1),
    }


def violations(one: dict[str, Any], jobs: list[Job]) -> list[str]:
    """What must not be in a run."""
    found = list(one["failures"])
    moved_tokens = sum(job.moved_tokens for job in jobs)
    if one["finished"] != len(jobs):
        found.append(f"of {len(jobs)} requests {one['finished']} finished")
    if one["verified_tokens"] != moved_tokens:
        found.append(f"of {moved_tokens} tokens {one['verified_tokens']} were right")
    return [f"{one['mode']} with {one['sink_tokens']} tokens: {words}" for words in found]


HEAD = (
    "mode     sink tokens  p50 ms  p99 ms  waited for blocks s  "
    "peak tokens  source CPU ms  sink CPU ms"
)


def row(one: dict[str, Any]) -> str:
    """A run as a line of the table."""
    lag, sink = one["lag_ms"], one["sink"]
    return (
        f"{one['mode']:<8} {one['sink_tokens']:>11} {lag['p50']:>7} {lag['p99']:>7} "
        f"{one['stall_s'].get(WAITED, 0.0):>20} {sink['peak_tokens']:>12} "
        f"{one['source']['cpu_ms_a_request']:>14} {sink['cpu_ms_a_request']:>12}"
    )


def main() -> None:
    """Read the options, run, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="so many; 0: all")
    parser.add_argument("--sink-tokens", type=int, default=SINK_TOKENS)
    parser.add_argument("--out", type=Path, help="write the result there, too")
    for number in dataclasses.fields(Model):
        assert isinstance(number.default, int | float)
        flag = "--" + number.name.replace("_", "-")
        parser.add_argument(flag, type=type(number.default), default=number.default)
    given = vars(parser.parse_args())
    model = Model(**{number.name: given[number.name] for number in dataclasses.fields(Model)})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing may outlive it
    machine = {
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load_before": os.getloadavg()[0],
    }
    requests = read_trace(given["trace"], given["requests"] or None)
    if not requests:
        parser.error(f"{given['trace']} has no requests")
    say(HEAD)
    result = {"machine": machine, **measure(requests, model, given["sink_tokens"])}
    same = result["same_p99"]
    say(f"sink memory needed for the same p99: {same}")
    text = json.dumps(result, indent=2)
    if given["out"]:
        given["out"].write_text(text + "\n")
    print(text)
    sys.exit(1 if result["violations"] else 0)


if __name__ == "__main__":
    main()
