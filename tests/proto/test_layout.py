"""Layout: planes lie in a block side by side; two layouts are equal or have a named difference."""

import hashlib
import itertools
from math import prod
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvferry_proto.layout import (
    ALIGN_BYTES,
    BLOCK_BYTES_MAX,
    STRIPS_MAX,
    Dtype,
    Layout,
    Order,
    Plane,
)
from wire_values import messages

layouts = messages(Layout)
K = Plane(name="k", dtype=Dtype.BFLOAT16, shape=(2, 3))
V = Plane(name="v", dtype=Dtype.UINT8, shape=())
BASE = Layout(planes=(K, V), aux=("rope",), block_size_tokens=5)


def test_a_layout_by_hand() -> None:
    assert [tuple(place) for place in BASE.places] == [(0, 12), (64, 1)]
    assert BASE.block_bytes == 128
    assert BASE.token_bytes == 13


def test_a_digest_is_that_of_the_json_that_the_wire_page_shows() -> None:
    shown = (
        b'{"planes":[{"name":"k","dtype":"bfloat16","shape":[2,3]},'
        b'{"name":"v","dtype":"uint8","shape":[]}],"aux":["rope"],"block_size_tokens":5}'
    )
    assert BASE.digest == hashlib.sha256(shown).digest()[:16]


def test_a_digest_names_heads_and_order_only_where_they_say_something() -> None:
    shown = (
        b'{"planes":[{"name":"k","dtype":"bfloat16","shape":[2,3],"heads_total":8,"order":"HND"},'
        b'{"name":"v","dtype":"uint8","shape":[2],"order":"HND"},'
        b'{"name":"w","dtype":"uint8","shape":[2],"heads_total":2}],"aux":[],"block_size_tokens":5}'
    )
    u8 = Dtype.UINT8
    layout = Layout(
        planes=(
            Plane(name="k", dtype=Dtype.BFLOAT16, shape=(2, 3), heads_total=8, order=Order.HND),
            Plane(name="v", dtype=u8, shape=(2,), order=Order.HND),
            Plane(name="w", dtype=u8, shape=(2,), heads_total=2, order=Order.NHD),
        ),
        block_size_tokens=5,
    )
    assert layout.digest == hashlib.sha256(shown).digest()[:16]


def test_a_layout_without_them_is_written_as_it_was_before_there_were_heads_and_orders() -> None:
    assert [set(plane) for plane in BASE.model_dump()["planes"]] == [{"name", "dtype", "shape"}] * 2


@given(layouts)
def test_planes_are_aligned_and_never_overlap(layout: Layout) -> None:
    end_bytes = 0
    for plane, place in zip(layout.planes, layout.places, strict=True):
        assert place.offset_bytes % ALIGN_BYTES == 0
        assert end_bytes <= place.offset_bytes < end_bytes + ALIGN_BYTES
        assert place.token_bytes == prod(plane.shape) * plane.dtype.element_bytes
        end_bytes = place.offset_bytes + place.token_bytes * layout.block_size_tokens
    assert layout.block_bytes % ALIGN_BYTES == 0
    assert end_bytes <= layout.block_bytes < end_bytes + ALIGN_BYTES
    assert layout.token_bytes == sum(place.token_bytes for place in layout.places)


@given(layouts)
def test_strips_are_a_planes_places_where_tokens_are_neighbours(layout: Layout) -> None:
    strips = iter(layout.strips)
    for plane, place in zip(layout.planes, layout.places, strict=True):
        count = plane.shape[0] if plane.order is Order.HND else 1
        end_bytes = place.offset_bytes
        for strip in itertools.islice(strips, count):
            assert strip == (end_bytes, place.token_bytes // count)
            end_bytes += strip.token_bytes * layout.block_size_tokens
        assert end_bytes == place.offset_bytes + place.token_bytes * layout.block_size_tokens
    assert next(strips, None) is None


def test_heads_are_shared_out_or_doubled() -> None:
    two_of_8 = Plane(name="k", dtype=Dtype.UINT8, shape=(2,), heads_total=8)
    assert [two_of_8.first_head(rank, 4) for rank in range(4)] == [0, 2, 4, 6]
    one_of_2 = Plane(name="k", dtype=Dtype.UINT8, shape=(1,), heads_total=2)
    assert [one_of_2.first_head(rank, 6) for rank in range(6)] == [0, 0, 0, 1, 1, 1]


def test_element_sizes_are_those_of_the_names() -> None:
    for dtype in Dtype:
        bits = "".join(c for c in dtype.value.partition("_")[0] if c.isdigit()) or "8"
        assert dtype.element_bytes * 8 == int(bits)


def changed(plane: dict[str, Any] | None = None, **fields: Any) -> Layout:
    """BASE with other fields, or with its first plane changed."""
    planes = [K.model_copy(update=plane or {}), V]
    return Layout(**{**BASE.model_dump(), "planes": planes, **fields})


DIFFERENCES = [
    (changed(block_size_tokens=6), "block_size_tokens: 5 and 6"),
    (changed({"name": "q"}), "planes[0] (k) name: k and q"),
    (changed({"dtype": Dtype.FLOAT16}), "planes[0] (k) dtype: bfloat16 and float16"),
    (changed({"shape": (3, 2)}), "planes[0] (k) shape: (2, 3) and (3, 2)"),
    (changed({"heads_total": 4}), "planes[0] (k) heads_total: None and 4"),
    (changed({"order": Order.HND}), "planes[0] (k) order: NHD and HND"),
    (changed(planes=[K]), "number of planes: 2 and 1"),
    (changed(aux=["other"]), "aux: ['rope'] and ['other']"),
    (changed(aux=[]), "aux: ['rope'] and []"),
]


@pytest.mark.parametrize(("other", "words"), DIFFERENCES)
def test_the_first_difference_is_named(other: Layout, words: str) -> None:
    assert BASE.first_difference(other) == words
    assert BASE.digest != other.digest


def test_every_field_of_a_layout_has_a_difference_of_its_own() -> None:
    words = " ".join(words for _, words in DIFFERENCES)
    fields = {*Layout.model_fields, *Plane.model_fields}
    assert {field for field in fields if field in words} == fields


@given(one=layouts, two=layouts)
def test_digests_are_equal_exactly_for_equal_layouts(one: Layout, two: Layout) -> None:
    assert (one.digest == two.digest) == (one == two) == (one.first_difference(two) is None)
    again = Layout.model_validate(one.model_dump())
    assert (again.digest, again.first_difference(one)) == (one.digest, None)


@given(layout=layouts, data=st.data())
def test_the_order_of_planes_matters(layout: Layout, data: st.DataObject) -> None:
    planes = data.draw(st.permutations(layout.planes))
    assume(tuple(planes) != layout.planes)
    other = layout.model_copy(update={"planes": tuple(planes)})
    assert Layout.model_validate(other.model_dump()).digest != layout.digest


BIG = Plane(name="big", dtype=Dtype.UINT8, shape=(1 << 24,))
WRONG: dict[str, dict[str, Any]] = {
    "no plane": {"planes": []},
    "a plane twice": {"planes": [K, K]},
    "an aux twice": {"planes": [K], "aux": ["a", "a"]},
    "no tokens in a block": {"planes": [K], "block_size_tokens": 0},
    "a huge block": {"planes": [BIG], "block_size_tokens": BLOCK_BYTES_MAX // (1 << 24) + 1},
    "a name with a space": {"planes": [{"name": "a b", "dtype": "uint8"}]},
    "a name with a final newline": {"planes": [{"name": "a\n", "dtype": "uint8"}]},
    "an axis of 0": {"planes": [{"name": "a", "dtype": "uint8", "shape": [0]}]},
    "nine axes": {"planes": [{"name": "a", "dtype": "uint8", "shape": [1] * 9}]},
    "HND without an axis": {"planes": [{"name": "a", "dtype": "uint8", "order": "HND"}]},
    "heads without an axis": {"planes": [{"name": "a", "dtype": "uint8", "heads_total": 1}]},
    "heads in no even share": {
        "planes": [{"name": "a", "dtype": "uint8", "shape": [3], "heads_total": 8}]
    },
    "more heads than there are": {
        "planes": [{"name": "a", "dtype": "uint8", "shape": [8], "heads_total": 4}]
    },
    "0 heads": {"planes": [{"name": "a", "dtype": "uint8", "shape": [1], "heads_total": 0}]},
    "an unknown dtype": {"planes": [{"name": "a", "dtype": "float4"}]},
    "a dtype in bytes": {"planes": [{"name": "a", "dtype": b"uint8"}]},
    "too many strips": {
        "planes": [{"name": n, "dtype": "uint8", "shape": [1 << 15], "order": "HND"} for n in "abc"]
    },
    "too many planes": {"planes": [{"name": f"p{i}", "dtype": "uint8"} for i in range(1025)]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layout_cannot_be_made(name: str) -> None:
    with pytest.raises(ValidationError):
        Layout(**WRONG[name])


def test_the_most_strips_are_allowed() -> None:
    plane = Plane(name="k", dtype=Dtype.UINT8, shape=(STRIPS_MAX,), order=Order.HND)
    assert len(Layout(planes=(plane,), block_size_tokens=1).strips) == STRIPS_MAX


def test_the_largest_block_is_allowed() -> None:
    layout = Layout(planes=(BIG,), block_size_tokens=BLOCK_BYTES_MAX >> 24)
    assert layout.block_bytes == BLOCK_BYTES_MAX
