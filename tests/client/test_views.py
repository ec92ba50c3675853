"""Views over planes of both orders: the same axes and numbers, other places in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvferry_client.views import Pool, Run, WindowView, runs_of
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from kvferry_proto.worker import PoolInfo

BLOCK, BLOCKS, HEADS, DIM = 4, 8, 3, 5
PLANES = (
    Plane(name="ids", dtype=Dtype.INT64),
    Plane(name="hnd", dtype=Dtype.FLOAT32, shape=(HEADS, DIM), order=Order.HND),
    Plane(name="nhd", dtype=Dtype.FLOAT32, shape=(HEADS, DIM)),
    Plane(name="bf", dtype=Dtype.BFLOAT16, shape=(HEADS, 2, DIM), order=Order.HND),
    Plane(name="scale", dtype=Dtype.FLOAT16, shape=(HEADS,), order=Order.HND),
)
LAYOUT = Layout(planes=PLANES, block_size_tokens=BLOCK)
RUNS = [(5, 2), (1, 1), (3, 1)]  # of a window from token 8 on, tokens 9 to 23 of which are there


@pytest.fixture
def window(tmp_path: Path) -> WindowView:
    path = tmp_path / "pool"
    path.write_bytes(bytes(BLOCKS * LAYOUT.block_bytes))
    info = PoolInfo(path=str(path), blocks=BLOCKS, block_bytes=LAYOUT.block_bytes, window_tokens=4)
    return WindowView(Pool(info, LAYOUT), 9, 14, runs_of(8, BLOCK, RUNS))


def numbers(plane: Plane, tokens: int) -> NDArray[Any]:
    shape = (tokens, *plane.shape)
    bits = np.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    return bits.astype("uint16" if plane.dtype is Dtype.BFLOAT16 else plane.dtype.value)


def in_file(window: WindowView, plane: Plane, block: int) -> NDArray[Any]:
    """A block's plane as its bytes lie in the file: heads first if the order is HND."""
    path = Path(window._pool.info.path)
    at = block * LAYOUT.block_bytes + LAYOUT.places[PLANES.index(plane)].offset_bytes
    lies = (BLOCK, *plane.shape)
    if plane.order is Order.HND:
        lies = (plane.shape[0], BLOCK, *plane.shape[1:])
    dtype = numbers(plane, 1).dtype
    return np.frombuffer(path.read_bytes(), dtype, int(np.prod(lies)), at).reshape(lies)


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_what_goes_in_comes_out_and_lies_as_the_order_says(
    window: WindowView, plane: Plane
) -> None:
    array = numbers(plane, window.tokens)
    window.scatter(plane.name, 9, array)
    assert np.array_equal(window.gather(plane.name), array)
    got = in_file(window, plane, 6)  # tokens 12 to 16
    want = array[3:7]
    assert np.array_equal(got, want.swapaxes(0, 1) if plane.order is Order.HND else want)
    others = [one for one in PLANES if one is not plane]
    assert not any(in_file(window, one, block).any() for one in others for block in range(BLOCKS))
    assert not in_file(window, plane, 0).any()  # nor another's block


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_what_is_gathered_begins_at_a_cache_line(window: WindowView, plane: Plane) -> None:
    kept = [window.gather(plane.name) for _ in range(8)]  # by chance one may
    assert [one.ctypes.data % 64 for one in kept] == [0] * 8
    assert all(one.flags.c_contiguous and one.flags.writeable for one in kept)


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_runs_have_the_same_axes_in_both_orders_and_are_no_copies(
    window: WindowView, plane: Plane
) -> None:
    arrays, tensors = window.numpy_runs(plane.name), window.torch_runs(plane.name)
    for array, tensor, (_, blocks) in zip(arrays, tensors, RUNS, strict=True):
        assert array.shape == tuple(tensor.shape) == (blocks, BLOCK, *plane.shape)
        assert str(tensor.dtype) == f"torch.{plane.dtype.value}"
    tensors[0][1, 2] = torch.ones(plane.shape, dtype=tensors[0].dtype)
    one = 0x3F80 if plane.dtype is Dtype.BFLOAT16 else 1
    assert (arrays[0][1, 2] == one).all()
    assert np.count_nonzero(in_file(window, plane, 6)) == np.prod(plane.shape)
    assert not np.any(arrays[0][0])


def test_a_run_at_the_end_of_the_pool_fits(window: WindowView) -> None:
    last = window._pool.plane("scale", Run(0, BLOCKS - 1, 1))
    last[...] = 1
    assert in_file(window, PLANES[4], BLOCKS - 1).all()
