"""Keys: what the command makes, what a daemon refuses, and what it sees while it runs."""

import json
import os
import stat
from pathlib import Path

import pytest

from cli.processes import kvferry
from kvferry_daemon.keys import SECRET, TRUSTED, Keys, KeysRefused, new_key, trust

ONE, TWO = "1" * 64, "2" * 64


def test_the_commands_make_show_and_trust(tmp_path: Path) -> None:
    env = {"KVFERRY_KEYS_DIR": str(tmp_path / "keys")}
    own = kvferry("keys", "new", env=env).stdout.strip()
    assert kvferry("keys", "trust", "node-7", ONE, env=env).returncode == 0
    assert kvferry("keys", "trust", "node-7", TWO, env=env).returncode == 0  # its next key
    shown = json.loads(kvferry("keys", "show", "--json", env=env).stdout)
    trusted = [{"name": "node-7", "key": ONE}, {"name": "node-7", "key": TWO}]
    assert shown == {"schema": "kvferry/keys/1", "key": own, "trusted": trusted}
    assert kvferry("keys", "show", env=env).stdout.splitlines() == [
        f"own key: {own}",
        f"node-7 {ONE}",
        f"node-7 {TWO}",
    ]
    for path in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert own not in (tmp_path / "keys" / SECRET).read_text()


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    before = new_key(tmp_path)
    refused = kvferry("keys", "new", "--keys-dir", tmp_path)
    assert (refused.returncode, "there already" in refused.stderr) == (2, True)
    assert Keys(tmp_path).public == before


@pytest.mark.parametrize(("name", "key"), [("a b", ONE), ("a", "1" * 63), ("a", ONE + "\n")])
def test_what_is_no_name_or_key_is_not_trusted(tmp_path: Path, name: str, key: str) -> None:
    with pytest.raises(KeysRefused):
        trust(tmp_path, name, key)
    assert not (tmp_path / TRUSTED).exists()


def test_one_key_has_one_name(tmp_path: Path) -> None:
    trust(tmp_path, "a", ONE)
    trust(tmp_path, "a", ONE)
    with pytest.raises(KeysRefused, match="a's"):
        trust(tmp_path, "b", ONE)
    assert (tmp_path / TRUSTED).read_text() == f"a {ONE}\n"


@pytest.mark.parametrize(("name", "mode"), [(SECRET, 0o604), (SECRET, 0o620), (TRUSTED, 0o622)])
def test_a_daemon_does_not_start_with_files_that_others_can_read_or_change(
    tmp_path: Path, name: str, mode: int
) -> None:
    new_key(tmp_path)
    trust(tmp_path, "a", ONE)
    Keys(tmp_path)
    (tmp_path / name).chmod(mode)
    started = kvferry("serve", "--runtime-dir", tmp_path / "run", "--keys-dir", tmp_path)
    assert started.returncode == 2
    assert "open to others" in started.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("secret", [None, "", "0" * 63, "x" * 64])
def test_a_daemon_does_not_start_without_its_key(tmp_path: Path, secret: str | None) -> None:
    if secret is not None:
        (tmp_path / SECRET).write_text(secret)
        (tmp_path / SECRET).chmod(0o600)
    started = kvferry("serve", "--runtime-dir", tmp_path / "run", "--keys-dir", tmp_path)
    assert started.returncode == 2
    assert str(tmp_path / SECRET) in started.stderr


def test_what_is_trusted_changes_while_we_run(tmp_path: Path) -> None:
    new_key(tmp_path)
    keys = Keys(tmp_path)
    assert keys.name_of(ONE) is None
    trust(tmp_path, "a", ONE)
    assert keys.reload()
    assert keys.name_of(ONE) == "a"
    assert not keys.reload()
    (tmp_path / TRUSTED).unlink()
    assert keys.reload()
    assert keys.trusted == {}


@pytest.mark.parametrize(
    "text", ["a\n", f"a {ONE} more\n", f"a {ONE[1:]}\n", f"a {ONE}\nb {ONE}\n"]
)
def test_a_file_that_is_wrong_changes_nothing_and_is_in_the_log(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    new_key(tmp_path)
    trust(tmp_path, "a", TWO)
    keys = Keys(tmp_path)
    (tmp_path / TRUSTED).write_text(text)
    assert not keys.reload()
    assert keys.trusted == {TWO: "a"}
    assert "line" in caplog.text
    caplog.clear()
    assert not keys.reload()  # and is not complained of again
    assert not caplog.text
    (tmp_path / TRUSTED).write_text(f"# ours\n\na {ONE}  # since May\n")
    assert keys.reload()
    assert keys.trusted == {ONE: "a"}


def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    new_key(tmp_path)
    os.chown(tmp_path / SECRET, 65534, 65534)
    with pytest.raises(KeysRefused, match="65534"):
        Keys(tmp_path)
