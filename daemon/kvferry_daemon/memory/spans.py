"""Which bytes of a pool hold a token extent of a window."""

from collections.abc import Sequence

Span = tuple[int, int]  # offset_bytes, length_bytes


def spans(
    runs: Sequence[tuple[int, int]],
    *,
    base_token: int,
    first_token: int,
    tokens: int,
    block_size: int,
    block_bytes: int,
    strips: Sequence[tuple[int, int]],
) -> list[Span]:
    """The spans of tokens [first_token, first_token + tokens), in the order they are sent.

    ``runs`` are (first_block, blocks) from ``base_token`` on; ``strips`` are (offset_bytes,
    token_bytes) within a block: the planes, or the heads of those that lie head by head. Whole
    blocks are one span with all their planes and padding, and neighbours are joined; a part of a
    block is one span a strip. The order of the bytes does not depend on where the blocks lie.
    ValueError for tokens that the window does not hold: the header of a chunk has promised all of
    them.
    """
    found: list[Span] = []
    token, end = base_token, first_token + tokens
    for first_block, blocks in runs:
        run_end = token + blocks * block_size
        low, high = max(token, first_token), min(run_end, end)
        position = low
        while position < high:
            block, inside = divmod(position - token, block_size)
            whole = 0 if inside else (high - position) // block_size
            at = (first_block + block) * block_bytes
            if whole:
                _append(found, at, whole * block_bytes)
                position += whole * block_size
                continue
            count = min(block_size - inside, high - position)
            for offset, token_bytes in strips:
                _append(found, at + offset + inside * token_bytes, count * token_bytes)
            position += count
        token = run_end
    if tokens and not base_token <= first_token <= end <= token:
        raise ValueError(f"tokens [{first_token}, {end}) of a window [{base_token}, {token})")
    return found


def _append(found: list[Span], offset: int, length: int) -> None:
    if found and sum(found[-1]) == offset:
        found[-1] = (found[-1][0], found[-1][1] + length)
    else:
        found.append((offset, length))
