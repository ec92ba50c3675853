"""`python -m bench.attacks`: every attack hits what it is meant for. Says nothing of speed."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from bench.attackers import ATTACKS
from bench.attacks import attackable, measure, table
from bench.served import ServedDaemon

from kvferry_proto.errors import FerryError

TOP = Path(__file__).parent.parent.parent
WAIT_S = 30.0
BUSY_S = 0.5  # of CPU: far more than a daemon takes that is left alone for so long
FILES = 1000
COUNTED = {
    "messages": "refused_hello_first",
    "full_messages": "messages_over_rate_worker",
    "full_messages_poured": "messages_over_rate_worker",
    "endless_to_worker": "connections_cut_for_memory",
    "frames": "bad_messages_worker",
    "unread_by_worker": "connections_cut_for_memory",
    "huge_answers": "refused_resource_exhausted",
    "waiting_polls": "messages_over_rate_worker",
    "open_and_abort": "source_failed",
    "aux": "source_opened",
    "transfers": "source_opened",
    "sessions": "refused_resource_exhausted",
    "sources": "refused_resource_exhausted",
    "endless_to_peer": "connections_cut_for_memory",
    "peer_messages": "pulls_received",
    "full_pulls": "pulls_received",
    "wants": "wants_dropped",
    "unread_by_peer": "connections_cut_for_memory",
    "huge_answers_to_peer": "pulls_received",
    "dones": "ledger_commits",
    "layouts": "pulls_received",
    "endless_from_source": "connections_cut_for_memory",
    "aux_from_source": "aux_over_bound",
    "tls_half_open": "handshakes_refused",
    "endless_to_control": "connections_cut_for_memory",
    "operator": "messages_over_rate_control",
    "unread": "messages_over_rate_control",
    "half_open_to_worker": "connections_over_bound_worker",
    "half_open_to_peer": "connections_over_bound_peer",
    "drops_to_peer": "connections_over_bound_peer",
    "half_open_to_data": "handshakes_refused",
    "half_open_to_http": "http_refused",
    "connects_to_worker": "connections_over_bound_worker",
    "connects_to_peer": "connections_over_bound_peer",
    "connects_to_http": "http_refused",
    "http_requests": "http_refused",
}
KEPT_BUSY = {
    "frame_too_long",
    "links",
    "messages_from_source",
    "layouts_from_source",
    "tickets",
    "streams",
    "tls_handshakes",
    "connects_to_data",
}  # nothing of it is counted, or not on every machine


def suffered(daemon: ServedDaemon, name: str) -> float:
    """A number that grows with the attack: by 1 at least, once it has begun."""
    if name == "lock_files":
        return len(list((daemon.directory / "workers").iterdir())) / FILES
    if name in KEPT_BUSY:
        return daemon.facts().cpu_s / BUSY_S
    return daemon.status().counters.get(COUNTED[name], 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_felt_and_goes_on(name: str) -> None:
    with attackable(name) as attacked:
        before = suffered(attacked.daemon, name)
        with attacked.by(name):
            until_s = time.monotonic() + WAIT_S
            grown = 0.0
            while grown < 1:
                assert time.monotonic() < until_s
                time.sleep(0.05)
                with suppress(FerryError):  # the daemon is too busy to tell
                    grown = suffered(attacked.daemon, name) - before


def test_what_it_costs_is_measured() -> None:
    cost = measure("unread", 2)
    assert cost.counted["messages_over_rate_control"] > 0
    assert cost.p50_ms > 0
    assert cost.peak_mib >= cost.base_mib
    assert cost.cpu_s > 0


def test_an_attacker_that_gives_up_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="the attacker of nobody ended by itself"):
        measure("nobody", 3)


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
