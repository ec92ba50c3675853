"""A vLLM engine that is told what to do: `python engine_process.py MODEL OPTIONS`, JSON lines.

It answers ``{"ready": true}``, then takes one command a line, many at once:
``{"id", "prompt", "max_tokens", "params"}`` generates, ``{"abort": id}`` aborts, ``{"id", "blocks": true}``
says whether no block of the cache is in use, ``{"id", "preempt": true}`` preempts all requests. End it by its process group: engines may hang on exit.
"""

import asyncio
import json
import sys
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError


def say(**fields: Any) -> None:
    """One line."""
    print(json.dumps(fields), file=sys.__stdout__, flush=True)


async def generate(engine: AsyncLLM, told: dict[str, Any]) -> None:
    """Generate greedily, and tell what came of it."""
    params = told.get("params")
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=told["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_transfer_params": params} if params else None,
    )
    try:
        async for output in engine.generate(
            {"prompt_token_ids": told["prompt"]}, sampling, told["id"]
        ):
            last = output
        done = last.outputs[0]
        say(
            id=told["id"],
            tokens=list(done.token_ids),
            reason=done.finish_reason,
            params=last.kv_transfer_params,
        )
    except (EngineGenerateError, EngineDeadError, ValueError) as error:
        say(id=told["id"], error=f"{type(error).__name__}: {error}")


async def main(model: str, options: dict[str, Any]) -> None:
    """Serve until stdin ends."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=model, skip_tokenizer_init=True, enforce_eager=True, **options)
    )
    say(ready=True)
    tasks: set[asyncio.Task[None]] = set()
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        if "abort" in told:
            await engine.abort(told["abort"])
        elif "blocks" in told:
            say(id=told["id"], are_free=await engine.reset_prefix_cache())
        elif "preempt" in told:
            running = len(tasks)
            reset = await engine.reset_prefix_cache(reset_running_requests=True)
            say(id=told["id"], are_preempted=bool(running and reset))
        else:
            tasks.add(task := asyncio.create_task(generate(engine, told)))
            task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
