"""A vLLM engine that is told what to do: `python engine_process.py MODEL OPTIONS`, JSON lines.

It answers ``{"ready": true}``, then takes one command a line, many at once:
``{"id", "prompt", "sounds", "max_tokens", "params", "items"}`` generates (``"names"`` in place of sounds:
what is named and is not there), ``{"abort": id}`` aborts, ``{"id", "blocks": true}``
says whether no block of the cache is in use, ``{"id", "preempt": true}`` preempts all requests,
``{"id", "forget_items": true}`` empties the encoder's cache, ``{"id", "metrics": true}`` says what Prometheus is told of kvferry. End it by its process group: engines may hang on exit.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.inputs.engine import mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError


def say(**fields: Any) -> None:
    """One line."""
    print(json.dumps(fields), file=sys.stdout, flush=True)


def keep_stdout() -> None:
    """Ours alone: libraries of this process and of its children print to stderr from here on."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


async def generate(engine: AsyncLLM, told: dict[str, Any]) -> None:
    """Generate greedily, and tell what came of it."""
    prompt: dict[str, Any] = {"prompt_token_ids": told["prompt"]}
    if told.get("sounds"):
        prompt["multi_modal_data"] = {"audio": [sound(*one) for one in told["sounds"]]}
    if told.get("names"):
        prompt = without_sounds(told["prompt"], told["names"])
    extra = {"kv_transfer_params": told.get("params"), "ec_transfer_params": told.get("items")}
    sampling = SamplingParams(
        n=told.get("n", 1),
        top_k=1,  # greedy, and several samples are let in
        max_tokens=told["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        extra_args={name: value for name, value in extra.items() if value} or None,
    )
    try:
        first_s = 0.0
        async for output in engine.generate(prompt, sampling, told["id"]):
            first_s = first_s or time.monotonic()  # one clock for all processes of a machine
            last = output
        done = last.outputs[0]
        say(
            id=told["id"],
            tokens=list(done.token_ids),
            samples=[list(one.token_ids) for one in last.outputs],
            reason=done.finish_reason,
            first_s=first_s,
            params=last.kv_transfer_params,
            items=last.ec_transfer_params,
            cached=last.num_cached_tokens,
        )
    except (EngineGenerateError, EngineDeadError, ValueError, VLLMError) as error:
        say(id=told["id"], error=f"{type(error).__name__}: {error}")


def sound(seed: int, seconds: float) -> tuple[Any, int]:
    """Noise that nobody has heard before, and how many samples a second it has."""
    random = np.random.default_rng(seed)
    return random.standard_normal(int(16_000 * seconds)).astype(np.float32), 16_000


def without_sounds(prompt: list[int], names: dict[str, list[int]]) -> Any:
    """A prompt as a router sends it where an encoder has heard the sounds: by name, where each lies."""
    nothing = MultiModalFieldElem(None, MultiModalBatchedField())
    items = MultiModalKwargsItems({"audio": [MultiModalKwargsItem(embeds=nothing) for _ in names]})
    places = [PlaceholderRange(offset=first, length=tokens) for first, tokens in names.values()]
    return mm_input(prompt, items, {"audio": list(names)}, {"audio": places})


def metrics() -> dict[str, float]:
    """The connector's, over all engines."""
    return {
        sample.name: sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("vllm:kvferry") and sample.name.endswith("_total")
    }


def is_coming(engine: AsyncLLM, tasks: dict[str, asyncio.Task[None]], name: str) -> bool:
    """Whether a request was asked for that vLLM does not know yet: it would abort nothing."""
    return name in tasks and name not in engine.output_processor.external_req_ids


async def main(model: str, options: dict[str, Any]) -> None:
    """Serve until stdin ends."""
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, enforce_eager=True, **options))
    say(ready=True)
    tasks: dict[str, asyncio.Task[None]] = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        if "abort" in told:
            while is_coming(engine, tasks, told["abort"]):  # noqa: ASYNC110  it says so by no event
                await asyncio.sleep(0.01)
            await engine.abort(told["abort"])
        elif "blocks" in told:
            say(id=told["id"], are_free=await engine.reset_prefix_cache())
        elif "forget_items" in told:
            await engine.reset_encoder_cache()
            say(id=told["id"])
        elif "metrics" in told:
            say(id=told["id"], metrics=metrics())
        elif "preempt" in told:
            running = len(tasks)
            reset = await engine.reset_prefix_cache(reset_running_requests=True)
            say(id=told["id"], are_preempted=bool(running and reset))
        else:
            tasks[told["id"]] = task = asyncio.create_task(generate(engine, told), name=told["id"])
            task.add_done_callback(lambda one: tasks.pop(one.get_name()))


if __name__ == "__main__":
    keep_stdout()
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
