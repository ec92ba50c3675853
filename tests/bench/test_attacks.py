"""`python -m bench.attacks`: every attack hits what it is meant for. Says nothing of speed."""

import subprocess
import sys
from pathlib import Path

import pytest
from bench.attackers import ATTACKS
from bench.attacks import measure, table

TOP = Path(__file__).parent.parent.parent
COUNTED = {
    "endless_to_worker": "connections_cut_for_memory",
    "frames": "bad_messages_worker",
    "half_open_to_worker": "connections_over_bound_worker",
    "half_open_to_peer": "connections_over_bound_peer",
    "half_open_to_data": "handshakes_refused",
    "half_open_to_http": "http_refused",
    "http_requests": "http_refused",
    "unread": "messages_over_rate_control",
}


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_an_attack_is_refused_and_counted(name: str) -> None:
    cost = measure(name, 3)
    assert cost.refused[COUNTED[name]] > 0
    assert cost.p50_ms > 0
    assert cost.peak_mib >= cost.base_mib
    assert name in ATTACKS


def test_the_command_prints_a_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.attacks", "1", "messages"],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    head, _, row = done.stdout.splitlines()
    assert head == table([]).splitlines()[0]
    assert row.startswith("| messages | ")
