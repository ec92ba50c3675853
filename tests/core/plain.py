"""A plain reading of the rule, kept to show what it breaks. Nothing uses it but test_holes.py.

``sent = previous + what I can count in the buffer; skip if sent == last_resume_at and sent > 0``.
The source pushes a window's tokens into the blocks that a resume named; a token slot that is not
None counts as arrived.
"""

from collections.abc import Callable

Slot = tuple[int, int] | None  # (attempt, token)


class PlainSink:
    """One transfer's sink, by the plain rule."""

    def __init__(self, blocks: int, block_size: int, send: Callable[[int], None]) -> None:
        self.slots: list[Slot] = [None] * (blocks * block_size)
        self.send = send  # asks the source for the tokens behind an offset
        self.sent = 0
        self.last_resume_at = 0
        self.total: int | None = None
        self.requests = 0

    def ask(self) -> None:
        """Ask for the next window."""
        self.requests += 1
        self.send(self.sent)

    def poll(self) -> int:
        """Count what is in the buffer; that is the progress."""
        return self.sent + sum(slot is not None for slot in self.slots)

    def resume(self) -> None:
        """Take what is there over and ask for more, unless that was done already."""
        at = self.poll()
        if at == self.last_resume_at and at > 0:
            return
        self.sent = self.last_resume_at = at
        self.ask()

    def retry(self) -> None:
        """Start again."""
        self.ask()

    def receive(self, first: int, slots: list[Slot]) -> None:
        """The source's push, wherever the window begins now."""
        for index, slot in enumerate(slots):
            place = first - self.sent + index
            if 0 <= place < len(self.slots):
                self.slots[place] = slot

    def read_total(self) -> int | None:
        """The total is in the first slot of the window, beside its token."""
        return None if self.slots[0] is None else self.slots[0][1]
