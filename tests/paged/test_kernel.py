"""The Triton kernel beside the copy in host memory: in Triton's interpreter, or on a GPU if there is one.

The interpreter knows nothing of types and of what a GPU does at once, so the kernel is also compiled
for one. That needs none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

IS_CUDA = torch.cuda.is_available()
if not IS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton and a kernel are loaded

from kvferry_client.paged import PagedCopy, _pairs
from kvferry_client.paged_host import HostCopier
from kvferry_client.paged_kernel import TritonCopier
from kvferry_proto.errors import FerryError
from kvferry_proto.layout import Dtype, Layout, Order, Plane
from paged.cases import Case, cached, case_of, cases

on_gpu = pytest.mark.skipif(not IS_CUDA, reason="no CUDA device: the kernel is interpreted here")


def assert_copies_alike(case: Case, *, to_pool: bool) -> None:
    """The kernel leaves every byte of both sides as the host copy does."""
    planes = list(_pairs(case.cache, case.paged_pool, case.heads))
    move = case.copy()._move(*case.where)
    before = case.put_aside("cuda" if IS_CUDA else "cpu")
    TritonCopier(list(_pairs(before.cache, before.paged_pool, case.heads))).copy(
        move, to_pool=to_pool
    )
    HostCopier(planes).copy(move, to_pool=to_pool)
    assert before.memory() == case.memory()


@pytest.mark.parametrize("to_pool", [True, False], ids=["gather", "scatter"])
@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_the_kernel_copies_what_the_host_copy_does(case: Case, to_pool: bool) -> None:
    assert_copies_alike(case, to_pool=to_pool)


LONG = [
    Plane(name="odd", dtype=Dtype.UINT8, shape=(1, 1319), order=Order.HND),
    Plane(name="scale", dtype=Dtype.FLOAT16, shape=()),
    Plane(name="even", dtype=Dtype.FLOAT32, shape=(2, 3001)),
    Plane(name="kv", dtype=Dtype.BFLOAT16, shape=(8, 128)),
    Plane(name="kv.hnd", dtype=Dtype.BFLOAT16, shape=(8, 128), order=Order.HND),
]


@pytest.mark.parametrize("to_pool", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("names", [["kv"], ["kv", "kv.hnd"], ["odd", "scale"], ["even", "kv"]])
def test_long_rows_and_many_tokens(names: list[str], to_pool: bool) -> None:
    """Rows of several strips, of several alignments in one launch, and several tiles of tokens."""
    layout = Layout(planes=tuple(p for p in LONG if p.name in names), block_size_tokens=32)
    planes = [cached(plane, 3, 16, Order.NHD, "of a head") for plane in layout.planes]
    case = case_of(
        layout, planes, runs=[(2, 1), (0, 1)], table=[9, 2, 0, 1], first=30, tokens=33
    )  # fmt: skip
    assert_copies_alike(case, to_pool=to_pool)


COMPILE = """
import json, re, sys, warnings
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvferry_client.paged_kernel import _copy
names = _copy.arg_names
for fixed in json.loads(sys.argv[1]):
    types = {"table": "*i64", "blocks": "*i64", **{name: "constexpr" for name in fixed}}
    source = ASTSource(
        _copy, {name: types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in fixed.items()},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(json.dumps(re.findall(r"(?:ld|st)[.]global([.][.v0-9b]+)", ptx)))
"""


def test_it_compiles_for_a_gpu_and_takes_words_as_wide_as_they_are_aligned(tmp_path: Path) -> None:
    words = {1 << 4: {".v2.b64"}, 1 << 2: {".b32"}, 1 << 4 | 1 << 1: {".v2.b64", ".b16"}}
    sizes = {"CACHE_BLOCK": 16, "POOL_BLOCK": 128, "TILE_TOKENS": 8, "TILE_WORDS": 256}
    wanted = [{"ALIGNS": aligns, "TO_POOL": way, **sizes} for aligns in words for way in (0, 1)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, json.dumps(wanted)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for fixed, line in zip(wanted, done.stdout.splitlines(), strict=True):
        assert set(json.loads(line)) - {".b64"} == words[fixed["ALIGNS"]], fixed  # .b64: the tables


@on_gpu
def test_a_copy_on_a_gpu_is_one_launch_of_the_kernel() -> None:
    layout = Layout(planes=tuple(LONG), block_size_tokens=32)
    planes = [cached(plane, 3, 16, Order.NHD, "alone") for plane in LONG]
    host = case_of(layout, planes, runs=[(0, 2)], table=[9, 2, 0, 1], first=30, tokens=33)
    case = host.put_aside("cuda")
    copy = case.copy()
    copy.gather(*case.where)  # compiled
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        copy.gather(*case.where)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "Mem" not in event.name]
    assert [name for name in kernels if "_copy" in name] == kernels[:1] == kernels
    host.copy().gather(*host.where)
    assert case.memory() == host.memory()


@on_gpu
def test_cache_and_pool_on_two_devices_are_refused() -> None:
    layout = Layout(planes=(LONG[3],), block_size_tokens=32)
    host = case_of(
        layout, [cached(LONG[3], 3, 16, Order.NHD, "alone")], runs=[(0, 1)], table=[0],
        first=0, tokens=1,
    )  # fmt: skip
    with pytest.raises(FerryError, match="not on cuda:0 and cpu"):
        PagedCopy(host.put_aside("cuda").cache, host.paged_pool)
