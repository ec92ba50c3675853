"""SGLang's metadata buffers as aux values: what goes beside the cache, a row for each request.

Imports nothing of SGLang.
"""

from collections.abc import Mapping
from typing import Any

import torch

AUX_VALUE_BYTES_MAX = 1 << 16


def aux_of(buffers: Any) -> dict[str, torch.Tensor]:
    """The rows that go with a request, by name: (rows, values) each.

    ``buffers``: SGLang's MetadataBuffers. ValueError names one whose rows are too long.
    """
    pointers = buffers.get_buf_infos()[0]
    found = {one.data_ptr(): name for name, one in vars(buffers).items() if torch.is_tensor(one)}
    aux = {found[pointer]: getattr(buffers, found[pointer]) for pointer in pointers}
    for name, rows in aux.items():
        if rows[0].nbytes > AUX_VALUE_BYTES_MAX:
            raise ValueError(
                f"metadata {name} has {rows[0].nbytes} bytes a request, over {AUX_VALUE_BYTES_MAX}"
            )
    return aux


def aux_values(aux: Mapping[str, torch.Tensor], row: int) -> dict[str, bytes]:
    """A request's row of each."""
    return {name: rows[row].cpu().view(torch.uint8).numpy().tobytes() for name, rows in aux.items()}


def take_aux(aux: Mapping[str, torch.Tensor], row: int, values: Mapping[str, Any]) -> None:
    """Write what came into a request's row of each; ValueError, and nothing written, if it is no row.

    It comes from another engine, whose buffers may be others.
    """
    for name, rows in aux.items():
        came, size = values.get(name), rows[row].nbytes
        if not isinstance(came, bytes) or len(came) != size:
            found = f"{len(came)} bytes" if isinstance(came, bytes) else type(came).__name__
            raise ValueError(f"metadata {name} has {found} a request at prefill, and here {size}")
    for name, rows in aux.items():
        row_bytes = torch.frombuffer(bytearray(values[name]), dtype=torch.uint8)
        rows[row].view(torch.uint8).copy_(row_bytes)
