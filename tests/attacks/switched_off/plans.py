"""Defences against layouts without an end, and against sources that pour, switched off."""

from attacks.switched_off.replacing import replace
from kvferry_daemon.core import plans
from kvferry_daemon.links.pressure import Pressure, cut_from

MANY = 1 << 30


def each_name_has_plans() -> None:
    """As many peers and sources as somebody says that he is have new plans of their own."""
    for bound in ("SHARED_MAX", "ALL_A_S"):
        replace(plans, bound, MANY)


def sources_pour_again() -> None:
    """A source that pours without end is cut, and connected to at once."""
    assert hasattr(Pressure, "_shun_source")
    Pressure._shun_source = lambda _self, *which: cut_from(*which)  # type: ignore[method-assign]


SWITCHES = (each_name_has_plans, sources_pour_again)
