"""Where settings come from, which one wins, and that no mistake in them is passed over."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import kvferry_client
from cli.processes import kvferry
from kvferry_daemon.config import WORKERS_OWN, Config, Deadlines
from kvferry_daemon.life import settings_of

EXIT_CONFIG = 2


def shown(*flags: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    """What `--print-config` says."""
    done = kvferry("serve", "--print-config", *flags, env=env)
    assert done.returncode == 0, done.stderr
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def refused(*flags: object, env: dict[str, str] | None = None) -> str:
    """The one line that refuses a config."""
    done = kvferry("serve", "--print-config", *flags, env=env)
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, ""), done
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config file with a setting and a deadline."""
    path = tmp_path / "kvferry.toml"
    path.write_text('window_tokens = 1024\nstall_s = 7\nbudget_bytes = "2MiB"\nchecksum = false\n')
    return path


def test_print_config_shows_every_setting_and_its_default() -> None:
    config = shown()
    assert set(config) == set(Config.model_fields)
    assert config["runtime_dir"] == f"/dev/shm/kvferry-{os.getuid()}"
    assert (config["window_tokens"], config["stall_s"], config["peer_port"]) == (8192, 60.0, 0)


def test_the_file_takes_effect(file: Path) -> None:
    for config in (shown("--config", file), shown(env={"KVFERRY_CONFIG": str(file)})):
        assert (config["window_tokens"], config["stall_s"]) == (1024, 7.0)
        assert (config["budget_bytes"], config["checksum"]) == (2 << 20, False)


def test_the_environment_takes_effect() -> None:
    config = shown(env={"KVFERRY_WINDOW_TOKENS": "512", "KVFERRY_INSECURE": "true"})
    assert (config["window_tokens"], config["insecure"]) == (512, True)


def test_a_flag_beats_the_environment_which_beats_the_file(file: Path) -> None:
    env = {"KVFERRY_CONFIG": str(file), "KVFERRY_WINDOW_TOKENS": "512", "KVFERRY_STALL_S": "8"}
    assert (shown(env=env)["window_tokens"], shown(env=env)["stall_s"]) == (512, 8.0)
    flags = ("--window-tokens", 256, "--stall-s", 9)
    config = shown(*flags, env=env)
    assert (config["window_tokens"], config["stall_s"]) == (256, 9.0)
    assert config["budget_bytes"] == 2 << 20, "what only the file names stays"


def test_the_flag_for_a_file_beats_the_variable_for_one(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("window_tokens = 2048")
    config = shown("--config", other, env={"KVFERRY_CONFIG": str(file)})
    assert (config["window_tokens"], config["stall_s"]) == (2048, 60.0)


@pytest.mark.parametrize("name", sorted(Config.model_fields))
def test_every_setting_is_a_flag_and_a_variable(name: str) -> None:
    assert f"--{name.replace('_', '-')}" in kvferry("serve", "--help").stdout
    value = str(Config(runtime_dir=Path("/x")).model_dump()[name] or "1")
    env = {f"KVFERRY_{name.upper()}": value, "KVFERRY_NOSUCH": "1"}
    assert "KVFERRY_NOSUCH" in refused(env=env), "this one is known, so the other is complained of"


def test_every_deadline_reaches_the_daemon() -> None:
    given = {name: float(n) for n, name in enumerate(Deadlines.model_fields, 1)}
    given["heartbeat_s"] = 0.5  # a lease is at least two of them
    ours = {"stop_s", "deadline_max_s"}  # the node's timing has no use for these
    config = Config(runtime_dir=Path("/x"), **given)
    assert config.deadlines.model_dump() == given
    settings = settings_of(config, "tcp://127.0.0.1:1", "d" * 32, 1)
    assert settings.deadline_max_s == given["deadline_max_s"]
    assert {name: getattr(settings.timing, name) for name in given if name not in ours} == {
        name: value for name, value in given.items() if name not in ours
    }


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("KVFERRY_WINDW_TOKENS", "KVFERRY_WINDOW_TOKENS"),
        ("KVFERRY_STALL_SECONDS", "KVFERRY_STALL_S"),
        ("kvferry_peer_port", "KVFERRY_PEER_PORT"),
        ("KVFERRY_CONFG", "KVFERRY_CONFIG"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest(variable: str, near: str) -> None:
    line = refused(env={variable: "5"})
    assert f" {variable};" in line
    assert line.endswith(near)


def test_an_unknown_name_in_the_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "kvferry.toml"
    path.write_text("windw_tokens = 5")
    line = refused("--config", path)
    assert str(path) in line
    assert "windw_tokens" in line
    assert line.endswith("window_tokens")


def test_variables_that_kubernetes_adds_for_a_service_called_kvferry_do_no_harm() -> None:
    links = {
        "KVFERRY_PORT": "tcp://10.0.0.1:5000",
        "KVFERRY_SERVICE_HOST": "10.0.0.1",
        "KVFERRY_SERVICE_PORT": "5000",
        "KVFERRY_SERVICE_PORT_PEERS": "5000",
        "KVFERRY_PORT_5000_TCP": "tcp://10.0.0.1:5000",
        "KVFERRY_PORT_5000_TCP_ADDR": "10.0.0.1",
        "KVFERRY_METRICS_SERVICE_HOST": "10.0.0.2",
        "KVFERRY_METRICS_PORT": "tcp://10.0.0.2:9000",
        "KVFERRY_HTTP_PORT": "tcp://10.0.0.3:9464",  # a setting's name, and a service's link
    }
    assert shown(env=links) == shown()
    assert "KVFERRY_PORT" in refused(env={"KVFERRY_PORT": "5000"}), "meant for us, and misspelt"


def test_what_workers_read_is_no_mistake_where_daemon_and_workers_share_an_environment() -> None:
    sources = (Path(kvferry_client.__file__).parent).rglob("*.py")
    read = {name for one in sources for name in re.findall(r'"(KVFERRY_\w+)"', one.read_text())}
    settings = {f"KVFERRY_{name.upper()}" for name in Config.model_fields}
    assert read - settings == WORKERS_OWN
    assert shown(env=dict.fromkeys(WORKERS_OWN, "1")) == shown()
    line = refused(env={"KVFERRY_MODEL_FINGERPRNT": "x"})
    assert line.endswith("KVFERRY_MODEL_FINGERPRINT")


@pytest.mark.parametrize(
    "flags",
    [
        ("--keys-dir", "/nowhere/keys"),
        ("--numa-node", "777"),
        ("--http-port", "0"),
        ("--otlp-endpoint", "http://127.0.0.1:4318/v1/traces"),
        ("--transport", "nixl"),
    ],
)
def test_the_check_refuses_keys_and_extras_in_the_words_of_serve(
    tmp_path: Path, flags: tuple[str, str]
) -> None:
    """In an installation without extras: none of them is found."""
    for verb in (("config", "check"), ("serve", "--runtime-dir", str(tmp_path / "d"))):
        done = without_extras(*verb, *flags)
        assert (done.returncode, done.stdout) == (EXIT_CONFIG, ""), done
        (line, *_) = done.stderr.splitlines()
        assert line.startswith("kvferry: config: ")
        assert any(word in line for word in ("/nowhere/keys", "NUMA node 777", "pip install"))


def without_extras(*args: str) -> subprocess.CompletedProcess[str]:
    """The command where what extras bring is not installed."""
    run = (
        "import importlib.util as u, importlib.metadata as m, sys\n"
        "find, version = u.find_spec, m.version\n"
        "gone = ('aiohttp', 'opentelemetry', 'nixl')\n"
        "u.find_spec = lambda n, *a: None if n.split('.')[0] in gone else find(n, *a)\n"
        "def told(n):\n"
        "    if n == 'nixl': raise m.PackageNotFoundError(n)\n"
        "    return version(n)\n"
        "m.version = told\n"
        f"from kvferry_daemon.cli import main; main({list(args)!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, timeout=30, check=False
    )


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert shown(env={"KVFERRY_RUNTIME_DIR": "", "KVFERRY_CONFIG": ""}) == shown()


@pytest.mark.parametrize("way", ["variable", "flag"])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, way: str) -> None:
    path = tmp_path / "nope.toml"
    if way == "variable":
        assert str(path) in refused(env={"KVFERRY_CONFIG": str(path)})
    else:
        done = kvferry("serve", "--print-config", "--config", path)
        assert done.returncode == EXIT_CONFIG
        assert "does not exist" in done.stderr


@pytest.mark.parametrize("content", [b"= nonsense", b"\x80\x9e"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kvferry.toml"
    path.write_bytes(content)
    assert f"{path} is not TOML" in refused("--config", path)


def test_a_file_may_come_through_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    # A daemon thread: whoever does not read the pipe must not keep the tests from ending.
    thread = threading.Thread(target=path.write_text, args=("window_tokens = 77",), daemon=True)
    thread.start()
    assert shown("--config", path)["window_tokens"] == 77
    thread.join(10)


def test_a_wrong_value_is_refused_under_the_name_that_it_was_given_by(tmp_path: Path) -> None:
    path = tmp_path / "kvferry.toml"
    path.write_text("streams = 99")
    assert f"streams in {path}: " in refused("--config", path)
    assert "KVFERRY_STALL_S: " in refused(env={"KVFERRY_STALL_S": "soon"})
    assert "--window-tokens: " in refused("--window-tokens", 0)


def test_a_lease_that_pings_cannot_renew_in_time_is_refused() -> None:
    """One of them may get lost."""
    assert "lease_s: 1.9 is under twice heartbeat_s, 1" in refused("--lease-s", 1.9)
    assert "lease_s: 30 is under twice heartbeat_s, 20" in refused("--heartbeat-s", 20)
    assert shown("--lease-s", 2)["lease_s"] == 2.0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "127.1"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert shown("--peer-host", host)["peer_host"] == host


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "::", "fe80::1", "node-7", "127.evil"])
def test_clear_text_off_loopback_needs_permission(host: str) -> None:
    assert "clear text" in refused("--peer-host", host, "--advertise-host", "10.0.0.1")
    allowed = shown("--peer-host", host, "--advertise-host", "10.0.0.1", "--insecure")
    assert allowed["insecure"]


def test_encryption_of_which_somebody_could_make_nothing_is_refused() -> None:
    encrypted = ("--payload-encryption", "tls")
    assert shown(*encrypted)["payload_encryption"] == "tls"
    assert "NIXL encrypts nothing" in refused(*encrypted, "--transport", "nixl")
    host = ("--peer-host", "10.0.0.1", "--insecure")
    assert "set keys_dir" in refused(*encrypted, *host)
    assert shown(*encrypted, *host, "--keys-dir", "/keys")["payload_encryption"] == "tls"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0", "::ffff:0.0.0.0", "*"])
def test_an_address_that_nobody_can_connect_to_is_not_announced(host: str) -> None:
    assert "advertise_host" in refused("--peer-host", host, "--insecure")
    both = ("--peer-host", host, "--insecure", "--advertise-host")
    assert shown(*both, "node-7")["advertise_host"] == "node-7"
    assert "advertise_host" in refused(*both, host)


def test_a_runtime_directory_too_deep_for_a_socket_is_refused() -> None:
    assert "runtime_dir" in refused("--runtime-dir", "/" + "x" * 100)


@pytest.mark.parametrize("device", ["host", "cuda:0", "cuda:7", "cuda:15"])
def test_pools_lie_in_the_host_or_in_one_gpu(device: str) -> None:
    assert shown("--device", device)["device"] == device


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:", "cuda:-1", "cuda:01", "gpu:0", "0"])
def test_a_device_that_is_none_is_refused_with_an_example(device: str) -> None:
    line = refused(env={"KVFERRY_DEVICE": device})
    assert f"device: {device!r} is neither host nor cuda:N, such as cuda:0" in line


@pytest.mark.parametrize("cpus", ["1-", "a,b", "9999999"])
def test_a_list_of_cpus_that_is_none_is_refused(cpus: str) -> None:
    line = refused("--copy-cpus", cpus)
    assert "copy_cpus" in line
    assert '"0-3,8"' in line


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--copy-cpus", str(max(os.sched_getaffinity(0)) + 1), "this process may not run on CPU"),
        ("--numa-node", "777", "there is no NUMA node 777"),
    ],
)
def test_a_placement_that_this_machine_has_not_is_refused_before_anything_is_made(
    tmp_path: Path, flag: str, value: str, words: str
) -> None:
    done = kvferry("serve", "--runtime-dir", tmp_path / "d", flag, value)
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    (line,) = done.stderr.splitlines()
    assert words in line
    assert not (tmp_path / "d").exists()
