"""A made-up trace of twenty requests, played whole. Says nothing of speed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOP = Path(__file__).parent.parent.parent
BLOCK_TOKENS = 512
SPEED = 20


def pair_blocks(pair: int) -> tuple[int, int]:
    """The blocks of both requests of a pair."""
    return 1 + pair % 4, 3 + pair % 7


def trace() -> list[dict[str, Any]]:
    """Pairs of requests with a prefix in common; the last pair's is the first one's, too."""
    lines: list[dict[str, Any]] = []
    for pair in range(10):
        for blocks in pair_blocks(pair):
            ids = [100 * (pair % 9) + index for index in range(blocks)]
            tokens = blocks * BLOCK_TOKENS - 37 * pair
            at_ms = 3000 * (len(lines) // 5)
            lines.append({"timestamp": at_ms, "input_length": tokens, "hash_ids": ids})
    return [line | {"output_length": 20} for line in lines]


def played(path: Path, *options: str) -> dict[str, Any]:
    """The result of a replay that must do well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")}
    ended = subprocess.run(
        [sys.executable, "-m", "bench.replay", f"--trace={path}", f"--speed={SPEED}", *options],
        check=False,
        cwd=TOP,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def test_every_request_finishes_and_prefixes_stay(tmp_path: Path) -> None:
    path, out = tmp_path / "trace.jsonl", tmp_path / "result.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in trace()))
    result = played(
        path,
        f"--out={out}",
        "--window-tokens=512",
        "--sink-tokens=2048",
        "--decode-workers=2",
        "--prefix-blocks=20",  # the first pair's is forgotten when the last one comes
    )
    assert json.loads(out.read_text()) == result
    assert result["violations"] == []
    told = result["trace"]
    assert told["requests"] == len(trace())
    assert told["input_tokens"] == sum(line["input_length"] for line in trace())
    held = [min(pair_blocks(pair)) for pair in range(10)]
    ends = [(line["input_length"] - 1) // BLOCK_TOKENS for line in trace()[1::2]]  # moves always
    assert told["skipped_tokens"] == BLOCK_TOKENS * sum(map(min, held, ends))
    assert told["moved_tokens"] == told["input_tokens"] - told["skipped_tokens"]
    assert [one["mode"] for one in result["runs"][:2]] == ["consume", "whole"]
    for one in result["runs"]:
        assert one["finished"] == told["requests"]
        assert one["verified_tokens"] == told["moved_tokens"]
        assert one["lag_ms"].keys() == one["taken_ms"].keys() == {"p50", "p99", "max"}
        assert sum(one["stall_s"].values()) > 0
        for end in ("source", "sink"):
            assert (
                0 <= one[end]["mean_tokens"] <= one[end]["peak_tokens"] <= one[end]["pool_tokens"]
            )
            assert one[end]["cpu_ms_a_request"] > 0
    assert result["same_p99"].keys() == {"consume_tokens", "whole_tokens", "times"}
