"""Measures `bench.engines`: pairs of vLLM engines on this machine, one pair a connector.

One pair after the other, because NIXL's threads spin while its engines live. Every round hands one
prompt over, and looks whether decode's tokens are those that prefill's engine goes on with. One
JSON object on stdout.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.engines import OTHERS, OURS
from bench.figures import absent, ratios, spread
from live import LiveDaemon
from vllm_live.asking import prompt
from vllm_live.engines import Engine, connector, make_model

TOKENS, SHORT_TOKENS = 2048, 256
ROUNDS, SHORT_ROUNDS = 5, 1
PINNED_ROUNDS = 2
PINNED_MAX_S = 45.0  # NIXL's lease is 30 s
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
OPTIONS: dict[str, Any] = {
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,  # vLLM's example cannot do with a prompt in chunks
}
POOLS = {
    "window_tokens": 8192, "pool_tokens": 32_768, "budget_bytes": "2GiB",
    "heartbeat_s": 1, "lost_s": 3,  # as they are by default
}  # fmt: skip
SIDES = ("prefill", "decode")
ENGINE_FAILED = (AssertionError, ImportError, KeyError)


class Way(NamedTuple):
    """Two engines with one connector; what prefill's request carries."""

    prefill: Engine
    decode: Engine
    params: Callable[[str], dict[str, Any] | None]


class Measured:
    """What came of a way, round by round; ``why`` it gives no figure, if so."""

    def __init__(self) -> None:
        self.first_token_ms: list[float] = []
        self.prefill_ms: list[float] = []
        self.pinned_s: list[float] = []
        self.why: str | None = None


def kvferry(path: Path, model: Path, stack: ExitStack) -> Way:
    """One daemon beside both engines, as on one node: what vLLM's own connectors are here, too."""
    daemon = stack.enter_context(LiveDaemon(path / "both", **POOLS))
    return _ours(path, model, stack, [daemon, daemon])


def two_daemons(path: Path, model: Path, stack: ExitStack) -> Way:
    """A daemon beside each engine, and a TCP stream with checksums: as between two nodes."""
    daemons = [stack.enter_context(LiveDaemon(path / side, **POOLS)) for side in SIDES]
    return _ours(path, model, stack, daemons)


def _ours(path: Path, model: Path, stack: ExitStack, daemons: list[LiveDaemon]) -> Way:
    engines = [
        Engine(path / f"{side}.log", model, connector(daemon.directory), **OPTIONS)
        for side, daemon in zip(SIDES, daemons, strict=True)
    ]
    return _way(stack, engines, lambda name: {"do_remote_decode": True, "transfer_id": name})


def nixl(path: Path, model: Path, stack: ExitStack) -> Way:
    """vLLM's NixlConnector, with its defaults but for what a CPU needs."""
    import nixl  # noqa: F401

    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    engines = [
        Engine(
            path / f"{side}.log",
            model,
            transfer,
            environment={
                "UCX_TLS": "tcp,self,sm",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
            },
            **OPTIONS,
        )
        for side, port in zip(SIDES, (15_600, 15_700), strict=True)
    ]
    empty = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    told = {"do_remote_decode": True, "do_remote_prefill": False, **empty}
    return _way(stack, engines, lambda _: told)


def files(path: Path, model: Path, stack: ExitStack) -> Way:
    """vLLM's example, which writes and reads files."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(path / "files")},
    }
    engines = [Engine(path / f"{side}.log", model, transfer, **OPTIONS) for side in SIDES]
    return _way(stack, engines, lambda _: None)


def _way(
    stack: ExitStack, engines: list[Engine], params: Callable[[str], dict[str, Any] | None]
) -> Way:
    for engine in engines:
        stack.enter_context(engine)
    prefill, decode = (engine.wait() for engine in engines)
    return Way(prefill, decode, params)


WAYS = {"kvferry": kvferry, "two_daemons": two_daemons, "nixl": nixl, "files": files}


def hand_over(way: Way, tokens: list[int], name: str, into: Measured) -> None:
    """One prompt: prefill, then decode, then the same tokens from prefill's engine."""
    asked_s = time.monotonic()
    first = way.prefill.generate(tokens, 1, way.params(name)).result()
    second = way.decode.generate(tokens, 4, first["params"]).result()
    into.prefill_ms.append(1000 * (first["first_s"] - asked_s))
    into.first_token_ms.append(1000 * (second["first_s"] - first["first_s"]))
    assert second["tokens"] == way.prefill.generate(tokens, 4).tokens, "other tokens than alone"


def pinned_s(way: Way, tokens: list[int], name: str) -> float:
    """How long prefill's blocks are in use after its answer, while nobody fetches."""
    done_s = float(way.prefill.generate(tokens, 1, way.params(name)).result()["first_s"])
    while not way.prefill.blocks_are_free() and time.monotonic() < done_s + PINNED_MAX_S:
        time.sleep(0.001)
    return time.monotonic() - done_s


def run(*, is_short: bool) -> dict[str, Any]:
    """All figures."""
    tokens, rounds = (SHORT_TOKENS, SHORT_ROUNDS) if is_short else (TOKENS, ROUNDS)
    measured = {name: Measured() for name in WAYS}
    alone_ms: list[float] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        model = make_model(Path(directory) / "model", **SHAPE)
        for name, make in WAYS.items():
            path = Path(directory) / name
            path.mkdir()
            try:
                with ExitStack() as stack:
                    way = make(path, model, stack)
                    measure(way, name, prompts(tokens, rounds), measured[name], path)
                    if name == "kvferry":
                        alone_ms = [alone(way.decode, one) for one in prompts(tokens, rounds, 1000)]
                    for number in range(1 if is_short else PINNED_ROUNDS):
                        asked = prompt(tokens, seed=2000 + number)
                        held_s = pinned_s(way, asked, f"{name}-dead-{number}")
                        measured[name].pinned_s.append(held_s)
            except ENGINE_FAILED as error:
                measured[name].why = _reason(path, error)
    return figures(measured, alone_ms, tokens)


def prompts(tokens: int, rounds: int, first: int = 0) -> list[list[int]]:
    """The same for every connector."""
    return [prompt(tokens, seed=first + number) for number in range(rounds)]


def measure(way: Way, name: str, asked: list[list[int]], into: Measured, path: Path) -> None:
    """Every prompt, behind one that connects; who gives other tokens pins blocks all the same."""
    try:
        hand_over(way, prompt(len(asked[0]), seed=-1), f"{name}-first", Measured())
        for number, tokens in enumerate(asked):
            hand_over(way, tokens, f"{name}-{number}", into)
    except AssertionError as error:
        into.why = _reason(path, error)


def alone(engine: Engine, tokens: list[int]) -> float:
    """Milliseconds to the first token of one engine that does all of it."""
    asked_s = time.monotonic()
    return 1000 * (float(engine.generate(tokens, 1).result()["first_s"]) - asked_s)


def figures(measured: dict[str, Measured], alone_ms: list[float], tokens: int) -> dict[str, Any]:
    """What stands in the result."""
    for our in OURS:
        assert measured[our].why is None, measured[our].why
    found: dict[str, Any] = {"tokens": tokens, "alone_first_token_ms": spread(alone_ms)}
    for name, one in measured.items():
        for key in ("first_token_ms", "prefill_ms"):
            found[f"{name}_{key}"] = absent(one.why) if one.why else spread(getattr(one, key))
        pinned = one.pinned_s
        found[f"{name}_pinned_s"] = spread(pinned) if pinned else absent(one.why or "not measured")
        for our in OURS if name in OTHERS else ():
            found[f"{our}_to_{name}_first_token"] = (
                absent(one.why)
                if one.why
                else ratios(measured[our].first_token_ms, one.first_token_ms)
            )
    ours = measured["kvferry"]
    nixl = measured["nixl"]
    found["pinned_nixl_to_kvferry"] = (
        ratios(nixl.pinned_s, ours.pinned_s)
        if nixl.pinned_s
        else absent(nixl.why or "not measured")
    )
    return found


def _reason(path: Path, error: Exception) -> str:
    """Why a connector gives no figure: its engines' first error, or ours."""
    logs = [log.read_text(errors="replace") for log in sorted(path.glob("*.log"))]
    lines = [line for log in logs for line in log.splitlines() if "Error: " in line]
    return (lines[0] if lines else f"{type(error).__name__}: {error}")[-300:]


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one small round")
    print(json.dumps(run(is_short=parser.parse_args().short)), file=sys.stdout)


if __name__ == "__main__":
    main()
