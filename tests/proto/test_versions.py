"""Versions: the highest common one, or an error that names both ranges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvferry_proto.errors import Code, Fault, FerryError
from kvferry_proto.versions import OURS, Versions, agree

numbers = st.integers(1, 12) | st.integers(1, 65535)
ranges = st.tuples(numbers, numbers).map(sorted).map(lambda r: Versions(low=r[0], high=r[1]))


@given(one=ranges, two=ranges)
def test_the_highest_common_version_is_used_or_both_ranges_are_named(
    one: Versions, two: Versions
) -> None:
    common = set(range(one.low, one.high + 1)) & set(range(two.low, two.high + 1))
    if common:
        assert agree(one, two) == agree(two, one) == max(common)
        return
    with pytest.raises(FerryError) as refused:
        agree(one, two)
    assert refused.value.code is Code.NO_COMMON_VERSION
    assert refused.value.fault is Fault.OPERATOR
    assert f"we speak wire versions {two.low} to {two.high}" in refused.value.message
    assert f"the other side {one.low} to {one.high}" in refused.value.message


def test_we_agree_with_ourselves() -> None:
    assert agree(OURS) == OURS.high


@pytest.mark.parametrize(("low", "high"), [(2, 1), (0, 1), (1, 65536), (-1, 1)])
def test_a_range_is_a_range(low: int, high: int) -> None:
    with pytest.raises(ValidationError):
        Versions(low=low, high=high)
