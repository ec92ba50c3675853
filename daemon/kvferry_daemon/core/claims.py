"""What a sink has asked for: extents, each claimed by one connection of one stream.

One writer an extent: a claim ends when its bytes are in place, when it is taken back, or when its
connection has ended; only then may the same tokens be claimed again.
"""

from collections.abc import Iterator

from kvferry_daemon.core.events import StreamKey
from kvferry_daemon.core.extents import ExtentSet
from kvferry_proto.peer import Want

CLAIMS_MAX = 256  # of one transfer: bounds the pull and what a cut stream costs


class Claims:
    """The claims of one transfer, and the connections that new ones may be made on.

    Each part of the payload has extents of its own.
    """

    def __init__(self, chunk_tokens: int, parts: int = 1) -> None:
        self._chunk_tokens = chunk_tokens
        self._asked = [ExtentSet() for _ in range(parts)]  # claimed now, or in place
        self._made: dict[tuple[int, int], tuple[StreamKey, Want]] = {}  # (part, first token)
        self._streams: dict[int, StreamKey] = {}
        self._next_stream = 0

    def __len__(self) -> int:
        return len(self._made)

    @property
    def wants(self) -> tuple[Want, ...]:
        """Every claim as a pull names it."""
        return tuple(want for _, want in self._made.values())

    @property
    def has_stream(self) -> bool:
        """Whether there is a connection to ask on."""
        return bool(self._streams)

    @property
    def streams(self) -> list[StreamKey]:
        """The connections that new claims may be made on."""
        return list(self._streams.values())

    @property
    def streams_claimed(self) -> list[StreamKey]:
        """Connections through which somebody may still write."""
        return sorted({key for key, _ in self._made.values()})

    def stream_up(self, key: StreamKey) -> None:
        """New claims may be made on this connection."""
        self._streams[key.stream] = key

    def stream_down(self, key: StreamKey) -> None:
        """Nobody writes through this connection any more: its claims end."""
        if self._streams.get(key.stream) == key:
            del self._streams[key.stream]
        for part, first in [place for place, (one, _) in self._made.items() if one == key]:
            self.drop(key, first, part)

    def make(self, first: int, edge: int, part: int = 0) -> Iterator[tuple[StreamKey, Want]]:
        """Claim what is neither claimed nor in place of [first, edge), in chunks, in turn."""
        keys = list(self._streams.values())
        for start, end in list(self._asked[part].gaps(first, edge)):
            while start < end and len(self._made) < CLAIMS_MAX:
                stop = min(end, (start // self._chunk_tokens + 1) * self._chunk_tokens)
                key = keys[self._next_stream % len(keys)]
                self._next_stream += 1
                want = Want.model_construct(
                    first_token=start,
                    tokens=stop - start,
                    stream=key.stream,
                    connection=key.connection,
                    part=part,
                )
                self._made[part, start] = key, want
                self._asked[part].add(start, stop)
                yield key, want
                start = stop

    def drop(self, key: StreamKey, first_token: int, part: int = 0) -> None:
        """A claim ended without bytes; the tokens may be claimed again."""
        want = self._take(key, first_token, part)
        if want is not None:
            self._asked[part].remove(first_token, first_token + want.tokens)

    def fulfil(self, key: StreamKey, first_token: int, part: int = 0) -> int | None:
        """A claim ended with its bytes in place; return how many tokens (None: no such claim)."""
        want = self._take(key, first_token, part)
        return None if want is None else want.tokens

    def _take(self, key: StreamKey, first_token: int, part: int) -> Want | None:
        """End this very connection's claim; one made anew elsewhere stays."""
        made = self._made.get((part, first_token))
        if made is None or made[0] != key:
            return None
        del self._made[part, first_token]
        return made[1]
