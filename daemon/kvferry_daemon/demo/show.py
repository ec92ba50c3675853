"""What a person sees of the demo while it runs, and at its end."""

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table


class Screen:
    """Bars on a terminal, lines elsewhere, nothing with ``quiet``."""

    def __init__(self, tokens: int, window_tokens: int, quiet: bool) -> None:
        self._console = Console(quiet=quiet)
        self._window_tokens = window_tokens
        self._progress = Progress(
            TextColumn("{task.description:>18}"),
            BarColumn(40),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f} {task.fields[note]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {
            name: self._progress.add_task(title, total=tokens, note="")
            for name, title in (("ready", "prefill ready"), ("sent", "decode received"))
        }
        self._bars["window"] = self._progress.add_task("window", total=window_tokens, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._progress.console.print(line, highlight=False)

    def ready(self, tokens: int) -> None:
        """The source worker has filled so many tokens."""
        self._progress.update(self._bars["ready"], completed=tokens)

    def sent(self, sent_tokens: int, base_tokens: int) -> None:
        """The sink has committed so many tokens."""
        self._progress.update(self._bars["sent"], completed=sent_tokens)
        self._progress.update(
            self._bars["window"],
            completed=sent_tokens - base_tokens,
            note=f"from token {base_tokens}",
        )

    def window(self, line: dict[str, Any]) -> None:
        """The sink worker took a window over."""
        total = line["total_tokens"]
        known = "total not known yet" if total is None else f"total {total}"
        self.say(
            f"window {line['window']}: tokens {line['first_token']} to {line['sent_tokens']} "
            f"in {line['runs']} run(s) of blocks, {known}"
            + (f"; resume({line['sent_tokens']})" if line["resume"] else "; the last one")
        )


def show_summary(result: dict[str, Any]) -> None:
    """The verdict, for people."""
    table = Table("what", "value", title="kvferry demo")
    for name, value in result.items():
        if name not in ("output_tokens", "expected_tokens"):
            table.add_row(name, str(value))
    console = Console()
    console.print(table)
    well = result["tokens_equal"] and result["bytes_equal"]
    console.print("[green]tokens and bytes are the same[/]" if well else "[red]NOT the same[/]")
