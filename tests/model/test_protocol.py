"""The protocol of one transfer, walked through to its end: no rule broken, nothing stuck.

`make model` walks the larger worlds too. What it proves: docs/protocol/README.md.
"""

import pytest

from model.explore import explore
from model.setups import SHOWS, SMALL
from model.state import Mutant, Setup


@pytest.mark.parametrize("setup", SMALL, ids=lambda setup: setup.name)
def test_no_rule_is_broken_and_nothing_is_stuck(setup: Setup) -> None:
    found = explore(setup)
    assert (found.problem, found.story) == (None, ())


@pytest.mark.parametrize("mutant", Mutant, ids=lambda mutant: mutant.name)
def test_a_mistake_is_found(mutant: Mutant) -> None:
    found = explore(SHOWS[mutant]._replace(mutant=mutant))
    assert found.problem is not None
    assert found.story
