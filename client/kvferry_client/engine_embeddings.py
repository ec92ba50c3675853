"""Embeddings between engines: a tensor in, a tensor out, one transfer each. Needs torch.

An encoder's output is one plane of so many tokens. Its consumer wants all of it or nothing, in host
memory; so a daemon whose pools lie in a GPU's memory does not serve here.
"""

from pathlib import Path

import torch

from kvferry_client.aio import AsyncClient, AsyncReceiving, AsyncSending
from kvferry_client.engine_pages import Memory
from kvferry_client.engine_sides import Fetching, Identity, Side
from kvferry_client.engine_thread import FerryThread
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Plane

PLANE = "embedding"
NOT_RUN = "the encoder did not run"


class EmbeddingFerry(FerryThread):
    """Moves tensors of one dtype and width, (tokens, width). Its methods return at once."""

    def __init__(
        self,
        runtime_dir: Path | str,
        dtype: str,
        width: int,
        identity: Identity,
        device: torch.device,
        name: str = "",
    ) -> None:
        """Begin to join the daemon; ``identity``: what both sides must tell alike, of all tensors.

        ``device``: where tensors lie that are sent.
        """
        plane = Plane(name=PLANE, dtype=Dtype(dtype), shape=(width,))
        layout = Layout(planes=(plane,), aux=tuple(identity))
        self._identity = identity
        super().__init__(runtime_dir, layout, name, Memory(device, 0, 1))

    def send(self, transfer_id: str, attempt: int, tensor: torch.Tensor | None) -> "OutgoingTensor":
        """Send what the GPU has been given to write; None tells the sink that nothing will come."""
        side = OutgoingTensor(self._memory, transfer_id, attempt, self._identity, tensor)
        self.start(side)
        return side

    def receive(
        self, transfer_id: str, attempt: int, source: str | None, tokens: int
    ) -> "IncomingTensor":
        """Fetch a tensor of so many tokens; 0 tells the source that nobody will."""
        side = IncomingTensor(self._memory, transfer_id, attempt, self._identity, source, tokens)
        self.start(side)
        return side


class OutgoingTensor(Side):
    """``ended`` once the tensor was copied into windows; from then on the payload is the daemon's."""

    def __init__(
        self,
        memory: Memory,
        transfer_id: str,
        attempt: int,
        identity: Identity,
        tensor: torch.Tensor | None,
    ) -> None:
        super().__init__(memory, transfer_id, attempt, identity)
        self._tensor = tensor
        self._event = memory.event()

    async def move(self, client: AsyncClient) -> None:
        """Fill windows with all of it."""
        tokens = 1 if self._tensor is None else len(self._tensor)
        why = NOT_RUN if self._tensor is None else None
        sending = await self._send(client, why, total_tokens=tokens, aux=self._aux)
        try:
            async with sending:
                try:
                    await self._fill(sending)
                except BaseException as error:
                    raise self._give_up(error) from error
                self.end()
        finally:
            await self._let_go(sending)

    def end(self, error: BaseException | None = None) -> None:
        """The encoder's memory is let go of, too, whoever holds on to this."""
        self._tensor = None
        super().end(error)

    async def _fill(self, sending: AsyncSending) -> None:
        if self._tensor is None:
            raise FerryError(Code.ABORTED, NOT_RUN)
        self._memory.follow(self._event)
        await sending.fill(0, {PLANE: self._tensor.detach().cpu()})


class IncomingTensor(Fetching):
    """``ended`` once ``tensor`` is here; with an ``error`` it is None."""

    def __init__(
        self,
        memory: Memory,
        transfer_id: str,
        attempt: int,
        identity: Identity,
        source: str | None,
        tokens: int,
    ) -> None:
        super().__init__(
            memory, transfer_id, attempt, identity, source, start_tokens=0, is_wanted=tokens > 0
        )
        self.tensor: torch.Tensor | None = None
        self._tokens = tokens

    async def _windows(self, receiving: AsyncReceiving) -> None:
        plane = receiving.logic.pool.plane_named(PLANE)
        dtype = getattr(torch, plane.dtype.value)
        tensor = torch.empty((self._tokens, *plane.shape), dtype=dtype)
        async for window in receiving.windows():
            self._check_identity(receiving.aux)
            if window.end_token > self._tokens:
                self._check_total(receiving.total_tokens, self._tokens)
            window.gather(PLANE, tensor[window.first_token : window.end_token])
        self._check_total(receiving.total_tokens, self._tokens)
        self.tensor = tensor
