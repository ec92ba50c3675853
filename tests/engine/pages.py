"""An engine that is nothing but pages: a KV cache in blocks, whose bytes tell token and request."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from kvferry_client.engine import NO_BLOCK, Ferry, layout_of
from kvferry_client.paged import CachePlane, PagedCache
from kvferry_proto.layout import Layout, Order
from live import BLOCK, WAIT_S, LiveDaemon

HEADS, CONTENT = 2, 6


class Pages:
    """Two layers that lie head by head and one that lies token by token, in shuffled blocks."""

    def __init__(
        self, block_tokens: int = 8, blocks: int = 128, identity: tuple[str, ...] = ()
    ) -> None:
        self.identity = identity
        self.block_tokens = block_tokens
        self.layers = {
            "layers.0": CachePlane(torch.zeros(blocks, HEADS, block_tokens, CONTENT), Order.HND),
            "layers.1": CachePlane(torch.zeros(blocks, HEADS, block_tokens, CONTENT), Order.HND),
            "latent": CachePlane(torch.zeros(blocks, block_tokens, CONTENT)),
        }
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks)).tolist()

    @property
    def layout(self) -> Layout:
        return layout_of([self.layers], block_size_tokens=BLOCK, identity=self.identity)

    @contextmanager
    def ferry(self, directory: Path) -> Iterator[Ferry]:
        """A ferry for this engine, once it has joined."""
        with Ferry(directory, self.layout, [PagedCache(self.layers)]) as ferry:
            assert ferry.wait_until_joined(WAIT_S), ferry.refusal
            yield ferry

    def take(self, tokens: int) -> list[int]:
        """A block table for so many tokens."""
        return [self.free.pop() for _ in range(-(-tokens // self.block_tokens))]

    def compute(
        self, table: list[int], first: int, end: int, request: int = 1, layer: int | None = None
    ) -> None:
        """Write what the KV cache of tokens [first, end) is, of one layer or all."""
        for token in range(first, end):
            for index in range(len(self.layers)) if layer is None else [layer]:
                self.token(table, token, index).copy_(self.content(token, index, request))

    def token(self, table: list[int], token: int, index: int) -> torch.Tensor:
        """Where a token of a layer lies."""
        tensor, order = list(self.layers.values())[index]
        block, inside = table[token // self.block_tokens], token % self.block_tokens
        return tensor[block, :, inside] if order is Order.HND else tensor[block, inside]

    def content(self, token: int, index: int, request: int) -> torch.Tensor:
        """What a token of a layer holds."""
        shape = (CONTENT,) if index == 2 else (HEADS, CONTENT)
        first = 4_000_000 * request + 64 * token + 16 * index  # exact in 32 bits
        return torch.arange(first, first + HEADS * CONTENT)[: math.prod(shape)].view(shape).float()

    def wrong(self, table: list[int], first: int, end: int, request: int = 1) -> list[int]:
        """The tokens of [first, end) that are not what they should be."""
        return [
            token
            for token in range(first, end)
            if table[token // self.block_tokens] != NO_BLOCK
            and not all(
                torch.equal(self.token(table, token, index), self.content(token, index, request))
                for index in range(len(self.layers))
            )
        ]


@contextmanager
def two_engines(
    a: LiveDaemon, b: LiveDaemon, prefill: Pages, decode: Pages
) -> Iterator[tuple[Ferry, Ferry]]:
    """A ferry of each, at the source's and at the sink's daemon."""
    with ExitStack() as stack:
        yield (
            stack.enter_context(prefill.ferry(a.directory)),
            stack.enter_context(decode.ferry(b.directory)),
        )
