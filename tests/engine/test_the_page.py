"""The code of docs/engines.md, as it stands: an engine that is written by it hands a prompt over."""

import re
from pathlib import Path
from typing import Any

import torch

from live import WAIT_S, LiveDaemon

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
JOIN, SEND, LAYERS, RECEIVE = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL
)
TOKENS, BLOCKS, HEADS, PAGE_TOKENS, CONTENT = 40, 8, 2, 16, 4
FIRST = 16  # tokens of a first step


def run(code: str, names: dict[str, Any]) -> None:
    exec(code, names)  # noqa: S102  what the page says, and nobody else


def engine(directory: Path) -> dict[str, Any]:
    """What the page takes for granted of an engine, with its ferry."""
    caches = [torch.zeros(BLOCKS, HEADS, PAGE_TOKENS, CONTENT) for _ in range(2)]
    names: dict[str, Any] = {"kv_caches": caches, "attempt": 0, "prompt": [0] * TOKENS}
    run(JOIN.replace("/run/kvferry/daemon", str(directory)), names)
    assert names["ferry"].wait_until_joined(WAIT_S)
    return names


def test_an_engine_that_is_written_by_the_page_hands_a_prompt_over(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path / "a") as a, LiveDaemon(tmp_path / "b") as b:
        prefill, decode = engine(a.directory), engine(b.directory)
        table, theirs = [5, 0, 3], [1, 7, 2]
        freed: list[list[int]] = []
        for cache in prefill["kv_caches"]:
            cache[table[0]] = torch.rand_like(cache[0])

        def compute(layer: int) -> None:
            for page in table[1:]:
                cache = prefill["kv_caches"][layer]
                cache[page] = torch.rand_like(cache[page])

        prefill |= {"transfer_id": "t", "block_table": table, "tokens_computed": FIRST}
        prefill |= {"free": freed.append, "compute": compute, "layers": 2}
        run(SEND, prefill)
        run(LAYERS, prefill | {"tokens_before": FIRST, "tokens_after": TOKENS})
        decode |= {"transfer_id": "t", "source": a.address, "block_table": theirs}
        decode |= {"tokens_cached": 0, "request": "its request", "schedule": freed.append}
        run(RECEIVE, decode)
        assert prefill["outgoing"].wait(WAIT_S)
        assert decode["incoming"].wait(WAIT_S)
        assert decode["incoming"].taken_tokens == TOKENS
        for ours, came in zip(prefill["kv_caches"], decode["kv_caches"], strict=True):
            assert torch.equal(came[theirs[:2]], ours[table[:2]])
            assert torch.equal(
                came[theirs[2]][:, : TOKENS % PAGE_TOKENS],
                ours[table[2]][:, : TOKENS % PAGE_TOKENS],
            )
        for one in (prefill, decode):
            one["ferry"].close()
