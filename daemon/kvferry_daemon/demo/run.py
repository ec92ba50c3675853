"""Starts two daemons and two workers, lets a real payload move, and compares what came out."""

import asyncio
import json
import secrets
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvferry_daemon.demo.processes import Child, ProcessFailed
from kvferry_daemon.demo.show import Screen, show_summary

WINDOW_TOKENS = 8192
BLOCK_TOKENS = 128
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
    as_json: bool,
    payload: str,
    tokens: int,
    handoff: bool,
    block_reuse: bool,
    total_late: bool,
    harm: str | None,
) -> int:
    """Run it; return the exit code: 0 if tokens and bytes are equal, 1 if not."""
    root = Path(tempfile.mkdtemp(prefix="kvferry-demo-", dir=_tmpfs()))
    try:
        demo = _Demo(root, payload, tokens, handoff, block_reuse, total_late, harm)
        result = asyncio.run(demo.run(quiet=as_json))
    except (ProcessFailed, TimeoutError) as error:
        print(f"kvferry demo: {error or 'took too long'}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if as_json:
        print(json.dumps(result))
    else:
        show_summary(result)
    return 0 if result["tokens_equal"] and result["bytes_equal"] else 1


def _tmpfs() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass
class _Demo:
    root: Path
    payload: str
    tokens: int
    handoff: bool
    block_reuse: bool
    total_late: bool
    harm: str | None
    story: Story = field(default_factory=Story)

    async def run(self, *, quiet: bool) -> dict[str, Any]:
        async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
            screen = stack.enter_context(Screen(self.tokens, WINDOW_TOKENS, quiet))
            source_dir, sink_dir, address = await self._daemons(stack, screen)
            await self._workers(stack, screen, source_dir, sink_dir, address)
        return self._result()

    async def _daemons(
        self, stack: AsyncExitStack, screen: Screen
    ) -> tuple[Path, Path, str | None]:
        share = 0.5 if self.handoff else 1.0
        source_dir = self.root / "source"
        source = await self._daemon(stack, "source", source_dir, share)
        screen.say(f"source daemon: pid {source['pid']}, {source['peer_address']}")
        if self.handoff:
            return source_dir, source_dir, None
        sink_dir = self.root / "sink"
        sink = await self._daemon(stack, "sink", sink_dir, 0.0)
        screen.say(f"sink daemon: pid {sink['pid']}, {sink['peer_address']}")
        return source_dir, sink_dir, source["peer_address"]

    async def _daemon(
        self, stack: AsyncExitStack, name: str, directory: Path, share: float
    ) -> dict[str, Any]:
        args = ["serve", "--runtime-dir", str(directory), "--source-share", str(share)]
        if self.block_reuse and not self.handoff and name == "sink":
            args += ["--pool-tokens", str(WINDOW_TOKENS)]
        args += ["--window-tokens", str(WINDOW_TOKENS), "--budget-bytes", "1GiB"]
        daemon = await Child.start(name, "kvferry_daemon", args, self.root)
        stack.push_async_callback(daemon.stop)
        return await daemon.first_line()

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
                child = await Child.start(
                    f"worker-{module}", f"kvferry_client.demo.{module}", args, self.root
                )
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
        story = self.story
        moved, seconds = story.sink["bytes"], story.sink["seconds_transfer"]
        return {
            "tokens_equal": story.sink["output_tokens"] == story.reference["output_tokens"],
            "bytes_equal": story.sink["digests"] == story.source["digests"],
            "payload": self.payload,
            "transport": "handoff" if self.handoff else "tcp",
            "tokens": story.sink["total_tokens"],
            "windows": story.windows,
            "resumes": len(story.resumes),
            "sent_tokens_at_resume": story.resumes,
            "bytes_moved": moved,
            "seconds_transfer": round(seconds, 4),
            "gigabytes_per_s": round(moved / max(seconds, 1e-9) / 1e9, 4),
            "output_tokens": story.sink["output_tokens"],
            "expected_tokens": story.reference["output_tokens"],
        }
