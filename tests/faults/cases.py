"""Which cases there are: every point, every victim, killed and stopped."""

import random
from typing import get_args

from faults.four import VICTIMS
from faults.points import POINTS
from faults.scene import Act, Case

SAMPLE, SAMPLE_SEED = 12, 1


def matrix(seed: int) -> list[Case]:
    """All of them; the seed draws which hit it is, and who goes on first."""
    cases = []
    for name, point in POINTS.items():
        for victim in VICTIMS:
            for act in get_args(Act):
                draw = random.Random(f"{seed} {name} {victim} {act}")
                nth, late = draw.randint(1, point.hits), draw.random() < 0.5
                cases.append(Case(name, victim, act, nth, late))
    return cases


def sample(seed: int = SAMPLE_SEED, size: int = SAMPLE) -> list[Case]:
    """A few: different points, every victim killed and stopped at least once."""
    draw = random.Random(seed)
    cases = matrix(seed)
    draw.shuffle(cases)
    chosen: list[Case] = []
    for case in cases:
        met = {(one.victim, one.act) for one in chosen}
        is_new = (case.victim, case.act) not in met or len(met) == len(VICTIMS) * 2
        if is_new and case.name not in {one.name for one in chosen}:
            chosen.append(case)
    return chosen[:size]
