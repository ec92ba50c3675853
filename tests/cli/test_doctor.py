"""`kvferry doctor`: what keeps `serve` from starting is a fault there, and nothing else is."""

import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cli.processes import kvferry
from kvferry_daemon import doctor
from kvferry_daemon.config import Config, load
from kvferry_daemon.doctor import FAULT, NOTE, WELL, Finding, examine
from kvferry_daemon.keys import SECRET, TRUSTED, new_key
from kvferry_daemon.memory import device
from kvferry_daemon.output import Exit
from kvferry_daemon.runtime_dir import LOCK

NOT_ROOT = 12345


def config(tmp_path: Path, **settings: Any) -> Config:
    return load({"runtime_dir": tmp_path / "a", **settings})


def found(config: Config) -> dict[str, Finding]:
    """By what was looked at."""
    return {one.what: one for one in examine(config)}


def test_keys_are_read_as_a_daemon_reads_them(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    asked = config(tmp_path, keys_dir=keys)
    assert found(config(tmp_path))["keys"].verdict == WELL
    assert found(asked)["keys"].verdict == FAULT
    assert "kvferry keys new" in found(asked)["keys"].seen
    key = new_key(keys)
    assert found(asked)["keys"].verdict == NOTE, "nobody is trusted yet"
    (keys / TRUSTED).write_text(f"b {key}\n")
    (keys / TRUSTED).chmod(0o600)
    assert found(asked)["keys"].verdict == WELL
    (keys / SECRET).chmod(0o644)
    assert found(asked)["keys"].verdict == FAULT
    assert "open to others" in found(asked)["keys"].seen
    done = kvferry("serve", "--runtime-dir", tmp_path / "a", "--keys-dir", keys)
    assert (done.returncode, "open to others" in done.stderr) == (Exit.USAGE, True)


def test_the_port_of_http_is_looked_at_as_the_others_are(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        seen = found(config(tmp_path, http_port=port))[f"http_port {port}"]
    assert (seen.verdict, "Address already in use" in seen.seen) == (FAULT, True)
    assert found(config(tmp_path, http_port=port))[f"http_port {port}"].verdict == WELL
    assert not [what for what in found(config(tmp_path)) if "http" in what]


@pytest.mark.parametrize(
    ("extra", "module", "settings"),
    [
        ("http", "aiohttp", {"http_port": 0}),
        ("otel", "opentelemetry.sdk", {"otlp_endpoint": "http://127.0.0.1:4318/v1/traces"}),
        ("tls", "cryptography", {"payload_encryption": "tls"}),
    ],
)
def test_an_extra_that_the_config_needs_is_missed(
    extra: str,
    module: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = config(tmp_path, **settings)
    assert found(asked)[f"extra {extra}"].verdict == WELL
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    seen = found(asked)[f"extra {extra}"]
    assert (seen.verdict, module in seen.seen) == (FAULT, True)
    assert f"kvferry[{extra}]" in seen.remedy
    assert f"extra {extra}" not in found(config(tmp_path)), "nobody asked for it"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
def test_a_directory_below_one_that_may_not_be_entered_is_a_fault_in_words() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as closed:  # root's alone, and all may go there
        directory = Path(closed) / "kvferry"
        directory.mkdir()
        code = (
            f"import json, os, sys; sys.path[:0] = {sys.path!r}\n"
            "from kvferry_daemon.config import load; from kvferry_daemon.doctor import examine\n"
            f"config = load({{'runtime_dir': {str(directory)!r}}})\n"
            f"os.setuid({NOT_ROOT}); print(json.dumps(examine(config)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stderr == b""
    what, verdict, seen, _ = json.loads(done.stdout)[1]
    assert (what, verdict, closed in seen) == ("runtime directory", FAULT, True), seen


@pytest.mark.parametrize(
    ("transport", "has_rdma", "verdict"),
    [
        ("nixl", True, FAULT),
        ("nixl", False, NOTE),
        ("auto", True, NOTE),
        ("tcp", True, NOTE),
    ],
)
def test_too_little_locked_memory_ends_no_daemon_but_one_that_insists_on_rdma(
    transport: str,
    has_rdma: bool,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    there = tmp_path / "infiniband" if has_rdma else tmp_path / "none"
    monkeypatch.setattr(doctor, "INFINIBAND", there)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (8 << 20, 8 << 20))
    asked = config(tmp_path, transport=transport, budget_bytes=1 << 30)
    seen = found(asked)["locked memory"]
    assert seen.verdict == verdict
    assert ("there is none" in seen.seen) != has_rdma


def test_a_tmpfs_that_is_too_small_is_a_fault_unless_a_daemon_has_its_pools_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_filesystem", lambda _path: "tmpfs")
    asked = config(tmp_path, budget_bytes=1 << 60)
    asked.runtime_dir.mkdir()
    lock = os.open(asked.runtime_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert found(asked)["memory for pools"].verdict == FAULT, "its file outlives a daemon"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found(asked)["memory for pools"].verdict == NOTE
    finally:
        os.close(lock)


class NotExported:
    """A GPU as some virtual machines and containers show it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def allocate(self, size_bytes: int) -> bytes:
        return bytes(size_bytes)

    def shared(self, _arena: bytes) -> None:
        raise device.NotShared(f"workers cannot open memory of {self.name}")


class Full(NotExported):
    """One whose memory somebody has, such as a daemon that runs."""

    def allocate(self, size_bytes: int) -> bytes:
        raise device.NoRoom(f"no {size_bytes} bytes of {self.name}")


@pytest.mark.parametrize(("gpu", "verdict"), [(NotExported, FAULT), (Full, NOTE)])
def test_memory_of_a_gpu_is_exported_before_it_is_called_well(
    gpu: type, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "Device", gpu)
    seen = found(config(tmp_path, device="cuda:0"))["GPU"]
    assert (seen.verdict, "cuda:0" in seen.seen) == (verdict, True)
