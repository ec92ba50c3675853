"""What deploy/ has for Kubernetes and systemd, as far as it can be checked without either."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cli.processes import kvferry
from kvferry_daemon.keys import new_key

TOP = Path(__file__).parent.parent.parent
DEPLOY = TOP / "deploy"
CUSTOM = {"PodMonitor"}  # its schema is the Prometheus operator's
POD_IP = "127.0.0.1"  # what status.podIP would be


def manifests() -> dict[str, dict[str, Any]]:
    return {
        f"{path.name}: {one['kind']}": one
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for one in yaml.safe_load_all(path.read_text())
    }


def containers(found: Any) -> Iterator[dict[str, Any]]:
    """Every container of ours, however deep it stands."""
    if isinstance(found, dict):
        if found.get("name") == "kvferry" and "image" in found:
            yield found
        found = list(found.values())
    if isinstance(found, list):
        for one in found:
            yield from containers(one)


def with_keys(env: dict[str, str], directory: Path) -> dict[str, str]:
    """What a container is told, with keys of this machine where a Secret's would be."""
    if "KVFERRY_KEYS_DIR" not in env:
        return env
    new_key(directory / "keys")
    return {**env, "KVFERRY_KEYS_DIR": str(directory / "keys")}


DAEMONS = {name: one for name, many in manifests().items() for one in containers(many)}


@pytest.mark.parametrize("name", [n for n, one in manifests().items() if one["kind"] not in CUSTOM])
def test_a_manifest_is_what_kubernetes_takes(name: str) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(manifests()[name], version, strict=True)


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemons_settings_are_good_and_its_ports_are_those_named(
    name: str, tmp_path: Path
) -> None:
    container = DAEMONS[name]
    env = {one["name"]: one.get("value", POD_IP) for one in container["env"]}
    done = kvferry("config", "check", env=with_keys(env, tmp_path))
    assert done.returncode == 0, done
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    settings = {"peer": "PEER_PORT", "data": "DATA_PORT", "metrics": "HTTP_PORT"}
    assert ports == {port: env[f"KVFERRY_{setting}"] for port, setting in settings.items()}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert mounts == [str(Path(env["KVFERRY_RUNTIME_DIR"]).parent), env["KVFERRY_KEYS_DIR"]]


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_drains_before_it_ends_by_a_command_that_exists(name: str) -> None:
    path, *command = DAEMONS[name]["lifecycle"]["preStop"]["exec"]["command"]
    assert path == "/opt/kvferry/bin/kvferry"
    assert kvferry(*command, "--help").returncode == 0


def test_two_daemons_are_described() -> None:
    assert len(DAEMONS) == 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_what_systemd_takes(tmp_path: Path) -> None:
    text = (DEPLOY / "kvferry.service").read_text()
    lines = re.findall(r"^Exec\w+=-?/opt/kvferry/bin/kvferry (\w+)", text, re.MULTILINE)
    assert lines == ["serve", "drain"]
    program = tmp_path / "kvferry"
    program.symlink_to("/bin/true")
    unit = tmp_path / "kvferry.service"
    unit.write_text(
        text.replace("/opt/kvferry/bin/kvferry", str(program)).replace("User=kvferry\n", "")
    )
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (
        0,
        [],
    )
