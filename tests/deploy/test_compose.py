"""The compose file: what its schema takes, and what its services do when run as they stand there."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from cli.processes import kvferry
from deploy.test_manifests import DEPLOY, TOP

FILE = DEPLOY / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
DAEMONS = ["prefill-daemon", "decode-daemon"]
WAIT_S = 90
PYTHON = "/opt/kvferry/bin/python"


def test_it_is_a_compose_file() -> None:
    found = compose_spec.PyCompose.from_json(json.dumps(yaml.safe_load(FILE.read_text())))
    found.validate()
    assert set(found.service_names()) == set(SERVICES)
    mounts = {mount for one in SERVICES.values() for mount in one["volumes"]}
    assert {mount.split(":")[0] for mount in mounts} == set(found.volumes or {})


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program), "--no-color", str(TOP / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemons_settings_are_good(name: str) -> None:
    assert kvferry("config", "check", env=SERVICES[name]["environment"]).returncode == 0


def test_it_is_of_the_dockerfiles_making() -> None:
    image = SERVICES["verdict"]
    asked = image["build"]["args"]
    dockerfile = (TOP / "Dockerfile").read_text()
    assert all(f"\nARG {name}=" in dockerfile for name in asked)
    assert (FILE.parent / image["build"]["context"]).resolve() == TOP


class Pair:
    """The services as processes of this machine: a directory for each volume, localhost for names."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = str(taken.getsockname()[1])
        self.home = home
        for volume in ("prefill", "decode"):
            (home / volume).mkdir()

    def _here(self, service: dict[str, Any], word: str) -> str:
        for mount in service["volumes"]:
            volume, where, *_ = mount.split(":")
            word = word.replace(where, str(self.home / volume))
        word = word.replace("7000", self.port).replace("$$", "$").replace(PYTHON, sys.executable)
        return word.replace("prefill-daemon", "localhost").replace("decode-daemon", "localhost")

    def start(self, name: str) -> subprocess.Popen[str]:
        """Run a service."""
        service = SERVICES[name]
        serve = [sys.executable, "-m", "kvferry_daemon"]
        words = [*service.get("entrypoint", serve), *service["command"]]
        mine = {"KVFERRY_RUNTIME_DIR": "/run/kvferry/daemon", **service.get("environment", {})}
        env = {name: self._here(service, value) for name, value in mine.items()}
        return subprocess.Popen(
            [self._here(service, word) for word in words],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def daemon(self, name: str) -> Iterator[None]:
        """Run a daemon until its healthcheck is well, and stop it afterwards."""
        process = self.start(name)
        try:
            directory = self.home / name.removesuffix("-daemon") / "daemon"
            check = SERVICES[name]["healthcheck"]["test"][2:]
            until_s = time.monotonic() + WAIT_S
            while kvferry(*check, env={"KVFERRY_RUNTIME_DIR": str(directory)}).returncode != 0:
                assert time.monotonic() < until_s
            yield
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_S)


def test_its_services_move_a_payload_and_the_verdict_sees_a_changed_one(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with ExitStack() as stack:
        for name in DAEMONS:
            stack.enter_context(pair.daemon(name))
        workers = [pair.start(name) for name in ("prefill", "decode", "reference")]
        for worker in workers:
            worker.communicate(timeout=WAIT_S)
        assert [worker.returncode for worker in workers] == [0, 0, 0]
        verdict = pair.start("verdict")
        said, _ = verdict.communicate(timeout=WAIT_S)
        assert verdict.returncode == 0, said
        assert said.splitlines()[1:] == ["bytes are the same", "tokens are the same"]
        told = tmp_path / "decode" / "decode"
        told.write_text(told.read_text().replace('"output_tokens": [', '"output_tokens": [1, '))
        verdict = pair.start("verdict")
        said, _ = verdict.communicate(timeout=WAIT_S)
        assert (verdict.returncode, said.splitlines()[2]) == (1, "tokens DIFFER")
