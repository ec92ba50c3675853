"""Starts two daemons and two workers, lets a real payload move, and compares what came out."""

import asyncio
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvferry_daemon.demo.processes import Child, Home, ProcessFailed
from kvferry_daemon.demo.show import Screen, show_summary

WINDOW_TOKENS = 8192
BLOCK_TOKENS = 128
# Room for one window and half of the next: the demo has to fit where a container's /dev/shm is
# Docker's 64 MiB. Two such pools of the larger payload, 1,568 bytes a token, take 36.8 MiB.
ROLE_TOKENS = WINDOW_TOKENS + WINDOW_TOKENS // 2
DEADLINE_S = 300.0
MODULES = {
    "kv": ("prefill", "decode", "reference"),
    "embeddings": ("encode", "language", "language_reference"),
}


@dataclass
class Story:
    """What the workers told."""

    source: dict[str, Any] = field(default_factory=dict)
    sink: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    resumes: list[int] = field(default_factory=list)
    windows: int = 0


def run_demo(
    *,
    tell: Callable[[dict[str, Any]], None] | None,
    payload: str,
    tokens: int,
    handoff: bool,
    block_reuse: bool,
    total_late: bool,
    harm: str | None,
) -> int:
    """Run it; return the exit code: 0 if tokens and bytes are equal, 1 if not.

    ``tell`` takes the result, in place of a live view and a summary.
    """
    demo = _Demo(payload, tokens, handoff, block_reuse, total_late, harm)
    try:
        result = asyncio.run(demo.run(quiet=tell is not None))
    except (ProcessFailed, TimeoutError, asyncio.CancelledError, ExceptionGroup) as error:
        print(f"kvferry demo: {_why(error)}", file=sys.stderr)
        return 1
    if tell is not None:
        tell(result)
    else:
        show_summary(result)
    return 0 if result["tokens_equal"] and result["bytes_equal"] else 1


def _why(error: BaseException) -> str:
    """What ended the demo, in words; a mistake of ours is raised."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return f"not done within {DEADLINE_S:g} s"
    if isinstance(error, asyncio.CancelledError):
        return "told to end"
    if not isinstance(error, ProcessFailed):
        raise error
    return str(error)


def _end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP unwind the demo as Ctrl-C does. What nohup ignores stays ignored."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)


@dataclass
class _Demo:
    payload: str
    tokens: int
    handoff: bool
    block_reuse: bool
    total_late: bool
    harm: str | None
    story: Story = field(default_factory=Story)
    home: Home = field(init=False)

    async def run(self, *, quiet: bool) -> dict[str, Any]:
        _end_like_ctrl_c()
        async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
            self.home = Home()
            stack.callback(self.home.leave)
            screen = stack.enter_context(Screen(self.tokens, WINDOW_TOKENS, quiet))
            source_dir, sink_dir, address = await self._daemons(stack, screen)
            await self._workers(stack, screen, source_dir, sink_dir, address)
        return self._result()

    async def _daemons(
        self, stack: AsyncExitStack, screen: Screen
    ) -> tuple[Path, Path, str | None]:
        share = 0.5 if self.handoff else 1.0
        source_dir = self.home.path / "source"
        source = await self._daemon(stack, "source", source_dir, share)
        screen.say(f"source daemon: pid {source['pid']}, {source['peer_address']}")
        if self.handoff:
            return source_dir, source_dir, None
        sink_dir = self.home.path / "sink"
        sink = await self._daemon(stack, "sink", sink_dir, 0.0)
        screen.say(f"sink daemon: pid {sink['pid']}, {sink['peer_address']}")
        return source_dir, sink_dir, source["peer_address"]

    async def _daemon(
        self, stack: AsyncExitStack, name: str, directory: Path, share: float
    ) -> dict[str, Any]:
        role_tokens = WINDOW_TOKENS if self.block_reuse else ROLE_TOKENS
        pool_tokens = 2 * role_tokens if self.handoff else role_tokens
        args = ["serve", "--runtime-dir", str(directory), "--source-share", str(share)]
        args += ["--window-tokens", str(WINDOW_TOKENS), "--pool-tokens", str(pool_tokens)]
        daemon = await self._child(name, "kvferry_daemon", args)
        stack.push_async_callback(daemon.stop)
        return await daemon.first_line()

    async def _child(self, name: str, module: str, args: list[str]) -> Child:
        return await Child.start(name, module, args, self.home.path, self.home.alive)

    async def _workers(
        self,
        stack: AsyncExitStack,
        screen: Screen,
        source_dir: Path,
        sink_dir: Path,
        address: str | None,
    ) -> None:
        transfer_id = f"demo-{secrets.token_hex(4)}"
        common = ["--transfer-id", transfer_id, "--tokens", str(self.tokens)]
        source_args = [*common, "--runtime-dir", str(source_dir)]
        if self.total_late:
            source_args.append("--total-late")
        sink_args = [*common, "--runtime-dir", str(sink_dir)]
        if address is not None:
            sink_args += ["--source", address]
        if self.harm is not None:
            sink_args += ["--harm", self.harm]
        jobs = zip(
            ("source", "sink", "reference"),
            MODULES[self.payload],
            (source_args, sink_args, ["--tokens", str(self.tokens)]),
            strict=True,
        )
        async with asyncio.TaskGroup() as group:
            for role, module, args in jobs:
                child = await self._child(f"worker-{module}", f"kvferry_client.demo.{module}", args)
                stack.push_async_callback(child.stop)
                group.create_task(self._listen(role, child, screen))

    async def _listen(self, role: str, child: Child, screen: Screen) -> None:
        async for line in child.lines():
            match line["event"]:
                case "ready":
                    screen.ready(line["ready_tokens"])
                case "sent":
                    screen.sent(line["sent_tokens"], line["base_tokens"])
                case "window":
                    self.story.windows += 1
                    if line["resume"]:
                        self.story.resumes.append(line["sent_tokens"])
                    screen.sent(line["sent_tokens"], line["first_token"])
                    screen.window(line)
                case "end":
                    setattr(self.story, role, line)

    def _result(self) -> dict[str, Any]:
        """The verdict.

        ``seconds_transfer``: the time in which the sink saw bytes on their way to it, which leaves
        out waiting for prefill or for a resume; ``gigabytes_per_s``: what came in that time over
        it, None if it saw none (in a handoff none move).
        """
        story = self.story
        seconds = story.sink["seconds_transfer"]
        rate = story.sink["bytes_timed"] / seconds / 1e9 if seconds else None
        return {
            "tokens_equal": story.sink["output_tokens"] == story.reference["output_tokens"],
            "bytes_equal": story.sink["digests"] == story.source["digests"],
            "payload": self.payload,
            "transport": "handoff" if self.handoff else "tcp",
            "tokens": story.sink["total_tokens"],
            "windows": story.windows,
            "resumes": len(story.resumes),
            "sent_tokens_at_resume": story.resumes,
            "bytes_moved": story.sink["bytes"],
            "seconds_transfer": round(seconds, 4),
            "gigabytes_per_s": None if rate is None else round(rate, 4),
            "output_tokens": story.sink["output_tokens"],
            "expected_tokens": story.reference["output_tokens"],
        }
