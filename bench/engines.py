"""From the end of prefill to decode's first token, between two vLLM engines, by connector.

It is measured by `bench.engines_run`, a process in the environment that `make test-vllm` makes, and
that `make bench-peers` puts NIXL into.
"""

import json
import os
import subprocess
from typing import Any

from bench.figures import absent
from bench.served import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
RUN_S = 900.0
OURS = ("kvferry", "two_daemons")
OTHERS = ("nixl", "files")
TIMES = ("first_token_ms", "prefill_ms", "pinned_s")
KEYS = (
    "alone_first_token_ms",
    *(f"{way}_{key}" for way in (*OURS, *OTHERS) for key in TIMES),
    *(f"{our}_to_{other}_first_token" for our in OURS for other in OTHERS),
    "pinned_nixl_to_kvferry",
)


def none(why: str) -> dict[str, Any]:
    """No figure at all."""
    return {key: absent(why) for key in KEYS}


def measure() -> dict[str, Any]:
    """All figures, or why there are none."""
    if not (ROOT / ".venv-vllm" / "installed").exists():
        return none("vLLM is not installed: make bench-peers")
    paths = ":".join(str(ROOT / name) for name in ("tests", "daemon", "client", "proto"))
    done = subprocess.run(
        [str(PYTHON), "-m", "bench.engines_run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench.engines_run: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
