"""One Secret for all daemons of a release, as a kubelet mounts it: they trust each other."""

from pathlib import Path

from attacks.test_peers import move
from kvferry_daemon.keys import SECRET, TRUSTED, new_key, trust
from kvferry_proto.states import State
from live import LiveDaemon, RawWorker


def mounted(directory: Path) -> Path:
    """Keys behind links, which is how a kubelet changes a Secret in one step."""
    data = directory / "..2026_11_26"
    trust(data, "release", new_key(data))
    (directory / "..data").symlink_to(data.name)
    for name in (SECRET, TRUSTED):
        (data / name).chmod(0o440)
        (directory / name).symlink_to(Path("..data") / name)
    return directory


def test_daemons_of_one_secret_move_a_payload(tmp_path: Path) -> None:
    keys = mounted(tmp_path / "keys")
    with (
        LiveDaemon(tmp_path / "a", keys_dir=keys) as source,
        LiveDaemon(tmp_path / "b", keys_dir=keys) as sink,
        RawWorker(source.directory) as prefill,
        RawWorker(sink.directory) as decode,
    ):
        assert move(prefill, decode, source.address).state is State.SUCCESS
