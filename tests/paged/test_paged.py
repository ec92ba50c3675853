"""Copies between paged caches and windows in host memory, and what is refused before any byte."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvferry_client.paged import CachePlane, HeadSlice, PagedCache, PagedCopy, PagedPool
from kvferry_client.paged_rows import rows_of
from kvferry_proto.errors import Code, FerryError
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from paged.cases import Case, cached, case_of, cases

N, H = Order.NHD, Order.HND
LAYOUT = Layout(
    planes=(
        Plane(name="k", dtype=Dtype.BFLOAT16, shape=(2, 4), heads_total=4, order=H),
        Plane(name="v", dtype=Dtype.BFLOAT16, shape=(2, 4), heads_total=4),
        Plane(name="ids", dtype=Dtype.INT64),
    ),
    block_size_tokens=4,
)
CACHE_SIZE, CACHE_BLOCKS, FIRST, TOKENS = 3, 8, 5, 13  # tokens 5 to 18: entries 1 to 6 of the table
TABLE = [-1, 6, 0, 3, 7, 1, 99]


def a_case(heads: HeadSlice | None = None, have: int | None = None) -> Case:
    planes = [
        cached(plane, CACHE_BLOCKS, CACHE_SIZE, order, form, have if plane.shape else None)
        for plane, order, form in zip(
            LAYOUT.planes, (N, H, N), ("of a head", "of all blocks", "alone"), strict=True
        )
    ]
    runs = [(3, 2), (1, 1), (6, 1)]
    return case_of(LAYOUT, planes, runs=runs, table=TABLE, first=FIRST, tokens=TOKENS, heads=heads)


@pytest.mark.parametrize("to_pool", [True, False], ids=["gather", "scatter"])
@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_right_bytes_are_copied_and_no_other(case: Case, to_pool: bool) -> None:
    want = case.expected(to_pool=to_pool)
    copy = case.copy()
    (copy.gather if to_pool else copy.scatter)(*case.where)
    assert case.memory() == want


def test_a_window_shows_what_was_gathered_and_gives_what_is_scattered() -> None:
    case = a_case()
    case.copy().gather(*case.where)
    tensor = case.cache.planes["k"].view(torch.int16)
    want = [tensor[TABLE[at // CACHE_SIZE], at % CACHE_SIZE] for at in range(FIRST, FIRST + TOKENS)]
    got = case.window.gather("k")[:TOKENS].view(np.int16)
    assert np.array_equal(got, torch.stack(want).numpy())
    case.window.scatter("k", FIRST, np.full((TOKENS, 2, 4), 7, np.uint16))
    case.copy().scatter(*case.where)
    assert (tensor[TABLE[1], 2] == 7).all()
    assert not (tensor[TABLE[1], 1] == 7).any()  # token 4


def test_a_cache_in_raw_bits_is_taken() -> None:
    """As engines have float8: uint8 tensors."""
    plane = Plane(name="k", dtype=Dtype.FLOAT8_E5M2, shape=(2, 4))
    layout = Layout(planes=(plane,), block_size_tokens=4)
    case = case_of(layout, [cached(plane, 2, 4, N, "alone")], runs=[(0, 1)], table=[1],
                   first=0, tokens=4)  # fmt: skip
    raw = case.cached[0].whole.view(torch.uint8)
    PagedCopy(PagedCache({"k": CachePlane(raw)}), case.paged_pool).gather(*case.where)
    assert np.array_equal(case.window.gather("k"), raw[1].numpy())


@pytest.mark.parametrize("kind", [tuple, lambda table: np.array(table, np.int32), torch.tensor])
def test_a_table_may_be_numbers_an_array_or_a_tensor(kind: Callable[[list[int]], Any]) -> None:
    case = a_case()
    want = case.expected(to_pool=True)
    case.copy().gather(kind(TABLE), *case.where[1:])
    assert case.memory() == want


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([0, 6, -1, 3, 7, 1], "entry 2 is -1, of a cache of 8 blocks"),
        ([0, 6, 2, 3, 7, 8], "entry 5 is 8, of a cache of 8 blocks"),
        ([0, 6, 2, 3, 7], r"6 integers are needed, not int64 of \(5,\)"),
        ([], "6 integers are needed"),
        ([0.0] * 6, "6 integers are needed, not float64"),
        (np.zeros((6, 1), np.int64), "6 integers are needed"),
        (torch.zeros(6, dtype=torch.int32, device="meta"), "in host memory, not on meta"),
    ],
)
@pytest.mark.parametrize("verb", ["gather", "scatter"])
def test_a_table_with_blocks_that_there_are_not_is_refused(
    verb: str, table: Any, words: str
) -> None:
    case = a_case()
    before = case.memory()
    with pytest.raises(FerryError, match=words) as refused:
        getattr(case.copy(), verb)(table, *case.where[1:])
    assert refused.value.code is Code.BAD_BLOCK_TABLE
    assert case.memory() == before


def test_a_block_is_not_written_twice_but_may_be_read_twice() -> None:
    case = a_case()
    before = case.memory()
    table = [0, 6, 2, 6, 7, 1]
    with pytest.raises(FerryError, match="a block stands twice among 5") as refused:
        case.copy().scatter(table, *case.where[1:])
    assert refused.value.code is Code.BAD_BLOCK_TABLE
    assert case.memory() == before
    case = case._replace(table=table)
    want = case.expected(to_pool=True)
    case.copy().gather(*case.where)
    assert case.memory() == want


@pytest.mark.parametrize(
    ("first", "tokens", "words"),
    [
        (4, 3, r"tokens \[4, 7\) are not in \[5, 20\)"),
        (18, 3, r"tokens \[18, 21\) are not in \[5, 20\)"),
        (6, 0, r"\[6, 6\) .*or none"),
        (6, -1, r"\[6, 5\) .*or none"),
    ],
)
def test_tokens_outside_of_the_window_are_refused(first: int, tokens: int, words: str) -> None:
    case = a_case()
    with pytest.raises(FerryError, match=words) as refused:
        case.copy().gather(list(range(8)), case.window, first, tokens)
    assert refused.value.code is Code.BAD_ARRAY


@pytest.mark.parametrize(
    ("at", "run", "words"),
    [
        (0, {"first_block": 7}, "blocks 7 to 9, of a pool of 8"),
        (0, {"first_block": -1}, "blocks -1 to 1, of a pool of 8"),
        (1, {"first_token": 16}, "no run of the window holds token 12"),
        (2, {"blocks": 0}, "no run of the window holds token 16"),
    ],
)
def test_a_window_that_the_pool_has_not_is_refused(
    at: int, run: dict[str, int], words: str
) -> None:
    case = a_case()
    case.window.runs[at] = case.window.runs[at]._replace(**run)
    with pytest.raises(FerryError, match=words) as refused:
        case.copy().gather(*case.where)
    assert refused.value.code is Code.BAD_ARRAY


PAIR = torch.zeros(8, 3, 2, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("planes", "words"),
    [
        ({}, "without planes"),
        ({"k": CachePlane(PAIR[0, 0, 0])}, "too few axes"),
        ({"k": CachePlane(PAIR[0, 0], H)}, "too few axes"),
        ({"k": CachePlane(PAIR[:0])}, "no element"),
        ({"k": CachePlane(PAIR[:1].expand(8, 3, 2, 4))}, "several elements in one place"),
        ({"k": CachePlane(PAIR.as_strided((8, 3, 2, 4), (20, 8, 4, 1)))}, "several elements"),
        ({"k": CachePlane(PAIR), "v": CachePlane(PAIR, H)}, r"differ .*\(8, 3\).*\(8, 2\)"),
        ({"k": CachePlane(PAIR), "v": CachePlane(PAIR[1:])}, r"\(8, 3\) on cpu, \(7, 3\)"),
        ({"k": CachePlane(PAIR), "v": CachePlane(PAIR.to("meta"))}, "on cpu, .* on meta"),
    ],
)
def test_tensors_that_are_no_cache_are_refused(planes: dict[str, CachePlane], words: str) -> None:
    with pytest.raises(FerryError, match=words) as refused:
        PagedCache(planes)
    assert refused.value.code is Code.BAD_ARRAY


@pytest.mark.parametrize(
    ("planes", "heads", "words"),
    [
        ({"q": CachePlane(PAIR)}, None, "no plane 'q' in the layout; it has k, v, ids"),
        ({"k": CachePlane(PAIR.float())}, None, "'k' takes bfloat16 or uint16, not float32"),
        ({"k": CachePlane(PAIR[:, :, :1])}, None, r"\[1, 4\] in the cache and \[2, 4\] in the"),
        ({"k": CachePlane(PAIR, H)}, None, r"\[3, 4\] in the cache and \[2, 4\] in the pool"),
        ({"k": CachePlane(torch.zeros(8, 3, 2, 8).bfloat16()[..., ::2])}, None, "not in one piece"),
        ({"k": CachePlane(PAIR.to("meta"))}, None, "not on meta and cpu"),
        ({"k": CachePlane(PAIR)}, HeadSlice(1, 0, 2), "heads 1 to 3 .* the cache has 2"),
        ({"k": CachePlane(PAIR)}, HeadSlice(0, 1, 2), "heads 1 to 3 .* the pool has 2"),
        ({"k": CachePlane(PAIR)}, HeadSlice(-1, 0, 1), "heads -1 to 0"),
        ({"k": CachePlane(PAIR)}, HeadSlice(0, 0, 0), "heads 0 to 0"),
        ({"ids": CachePlane(torch.zeros(8, 3).long())}, HeadSlice(0, 0, 1), "none of which has"),
    ],
)
def test_a_cache_that_does_not_fit_the_pool_is_refused(
    planes: dict[str, CachePlane], heads: HeadSlice | None, words: str
) -> None:
    with pytest.raises(FerryError, match=words) as refused:
        PagedCopy(PagedCache(planes), a_case().paged_pool, heads)
    assert refused.value.code is Code.BAD_ARRAY


@pytest.mark.parametrize(
    "memory",
    [
        torch.zeros(2, LAYOUT.block_bytes),
        torch.zeros(2, LAYOUT.block_bytes + 64, dtype=torch.uint8),
        torch.zeros(2 * LAYOUT.block_bytes, dtype=torch.uint8),
        torch.zeros(4, LAYOUT.block_bytes, dtype=torch.uint8)[::2],
    ],
)
def test_memory_that_is_no_pool_is_refused(memory: torch.Tensor) -> None:
    with pytest.raises(FerryError, match="a pool is contiguous uint8 of") as refused:
        PagedPool(memory, LAYOUT)
    assert refused.value.code is Code.BAD_ARRAY


@pytest.mark.parametrize(("skip", "align_bytes"), [(0, 16), (8, 8), (4, 4), (2, 2), (5, 1)])
def test_words_are_as_wide_as_addresses_allow(skip: int, align_bytes: int) -> None:
    """Strides and rows that are multiples of 16 bytes say nothing of where a tensor begins."""
    whole = torch.zeros(4, 2, 3, 64, dtype=torch.uint8)
    view = whole[..., skip : skip + 16]
    assert whole.data_ptr() % 16 == 0
    assert rows_of("k", view, torch.zeros_like(whole[..., :16])).align_bytes == align_bytes
    elsewhere = torch.from_numpy(whole.numpy()[..., skip : skip + 16])  # an offset of 0
    assert rows_of("k", elsewhere, whole[..., :16]).align_bytes == align_bytes


def test_an_axis_of_one_entry_makes_no_word_narrower() -> None:
    one = torch.zeros(128, dtype=torch.uint8).as_strided((1, 2, 1, 16), (5, 32, 3, 1))
    assert rows_of("k", one, one.clone()).align_bytes == 16


def test_the_client_needs_neither_torch_nor_triton() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['triton'] = None; import kvferry_client"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_host_memory_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import kvferry_client.paged"
    subprocess.run([sys.executable, "-c", code], check=True)
