"""A seeded sample of `make faults`: real processes, killed and stopped at named places."""

from pathlib import Path

import pytest

from faults.cases import sample
from faults.scene import Case, Scene


@pytest.mark.parametrize("case", sample(), ids=str)
def test_the_payload_arrives_and_nothing_is_left(tmp_path: Path, case: Case) -> None:
    with Scene(tmp_path, case) as scene:
        scene.run()
