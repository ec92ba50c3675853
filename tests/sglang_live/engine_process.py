"""An SGLang engine that is told what to do: `python engine_process.py MODEL OPTIONS`, JSON lines.

It answers ``{"ready": true}``, then takes one command a line, many at once: ``{"id", "prompt",
"max_tokens", "meeting"}`` generates, ``{"abort": id}`` aborts, ``{"id", "blocks": true}`` says
whether no request is left and every slot of the cache is free. End it by its process group.
"""

import asyncio
import json
import sys
from typing import Any

from fastapi import HTTPException
from sglang.srt.entrypoints.engine import Engine


def say(**fields: Any) -> None:
    """One line."""
    print(json.dumps(fields), file=sys.__stdout__, flush=True)


async def generate(engine: Engine, told: dict[str, Any]) -> None:
    """Generate greedily, and tell what came of it."""
    try:
        done = await engine.async_generate(
            input_ids=told["prompt"],
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": told["max_tokens"],
                "ignore_eos": True,
            },
            rid=told["id"],
            return_logprob=told["logprobs"],
            **told["meeting"],
        )
    except (HTTPException, ValueError) as error:
        say(id=told["id"], error=type(error).__name__, message=str(error))
        return
    about = done["meta_info"]
    logprobs = [one[0] for one in about.get("output_token_logprobs", [])]
    reason = about["finish_reason"]
    say(
        id=told["id"],
        tokens=done["output_ids"],
        reason=reason["type"],
        message=reason.get("message"),
        logprobs=logprobs,
    )


async def blocks(engine: Engine, told: dict[str, Any]) -> None:
    """Empty the prefix cache, which an engine with requests refuses."""
    done = await engine.tokenizer_manager.flush_cache()
    say(id=told["id"], are_free=done.success)


async def main(engine: Engine) -> None:
    """Serve until stdin ends."""
    say(ready=True)
    tasks: set[asyncio.Task[None]] = set()
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        if "abort" in told:
            engine.tokenizer_manager.abort_request(rid=told["abort"])
            continue
        serve = blocks if "blocks" in told else generate
        tasks.add(task := asyncio.create_task(serve(engine, told)))
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    started = Engine(model_path=sys.argv[1], **json.loads(sys.argv[2]))
    started.loop.run_until_complete(main(started))
