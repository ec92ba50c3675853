"""A plain reading of the rule, kept to show what it breaks. Nothing uses it but test_holes.py.

``sent = previous + what I can count in the buffer; skip if sent == last_resume_at and sent > 0``.
The source pushes the next window each time it is asked; a token slot that is not None counts as
arrived; the total stands in a window's first slot, beside its token.
"""

Slot = tuple[int, int] | None  # (attempt, token)


class PlainSink:
    """One transfer's sink, by the plain rule."""

    def __init__(self, window_tokens: int) -> None:
        self.slots: list[Slot] = [None] * window_tokens
        self.sent = 0
        self.last_resume_at = 0
        self.asked = 1  # requests under way: the first window is asked for at once

    def poll(self) -> int:
        """Count what is in the buffer; that is the progress."""
        return self.sent + sum(slot is not None for slot in self.slots)

    def resume(self) -> None:
        """Take what is there over and ask for more, unless that was done already."""
        at = self.poll()
        if at == self.last_resume_at and at > 0:
            return
        self.sent = self.last_resume_at = at
        self.asked += 1

    def read_total(self) -> int | None:
        """What stands where the total should."""
        return None if self.slots[0] is None else self.slots[0][1]


class PlainRig:
    """A plain sink, the source that pushes to it, and the network between."""

    def __init__(self, window_tokens: int, total: int, *, reuses_blocks: bool) -> None:
        self.window_tokens = window_tokens
        self.total = total
        self.reuses_blocks = reuses_blocks  # else each window gets clean ones: to see other holes
        self.attempt = 0
        self.next_token = 0  # of the source
        self.sink = PlainSink(window_tokens)
        self.read: list[Slot] = []

    @property
    def sent_tokens(self) -> int:
        return self.sink.poll()

    @property
    def total_told(self) -> int | None:
        return self.sink.read_total()

    @property
    def ended(self) -> bool:
        return self.total_told is not None and self.sent_tokens == self.total_told

    @property
    def requests(self) -> int:
        return self.sink.asked

    @property
    def landed(self) -> object:
        """All that a block-minded worker can tell a landed window by."""
        return [index for index, slot in enumerate(self.sink.slots) if slot is not None]

    def land(self) -> None:
        """Every request under way is served, each with the tokens that come next."""
        while self.sink.asked:
            self.sink.asked -= 1
            end = min(self.next_token + self.window_tokens, self.total)
            for index, token in enumerate(range(self.next_token, end)):
                self.sink.slots[index] = (self.attempt, token)
            self.next_token = end

    def take(self) -> None:
        self.read += [slot for slot in self.sink.slots if slot is not None]
        self.sink.resume()
        if not self.reuses_blocks:
            self.sink.slots = [None] * self.window_tokens

    def resume(self) -> None:
        self.sink.resume()

    def double(self) -> None:
        self.sink.asked *= 2

    def lose(self) -> None:
        self.sink.asked = 0

    def wait(self) -> None:
        """Nothing in the plain rule has a timer."""

    def end_payload(self) -> None:
        """The source has no more tokens; what it pushes now is empty."""
        self.total = self.next_token

    def retry(self) -> None:
        self.attempt += 1
        self.next_token = self.sink.sent
        self.sink.asked = 1

    def twin(self) -> "PlainRig":
        """Another rank of the same group."""
        return PlainRig(self.window_tokens, self.total, reuses_blocks=self.reuses_blocks)

    def resume_at(self, _tokens: int) -> None:
        """The plain rule names no token: it counts for itself."""
        self.sink.resume()
