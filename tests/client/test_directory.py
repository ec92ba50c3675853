"""Whose runtime directory a worker and an operator take for their daemon's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from client.payloads import LAYOUT
from kvferry_client import FerryError, connect
from kvferry_daemon.operator import ask
from kvferry_proto import control, runtime_dir
from live import LiveDaemon

USES: tuple[Callable[[Path], object], ...] = (
    lambda path: connect(path, LAYOUT).close(),
    lambda path: ask(path, control.GetStatus()),
)


@pytest.mark.parametrize("use", USES, ids=("worker", "operator"))
def test_a_directory_that_anybody_may_write_to_is_refused(
    tmp_path: Path, use: Callable[[Path], object]
) -> None:
    """Whoever can put a socket there can be the daemon."""
    with LiveDaemon(tmp_path / "a") as daemon:
        daemon.directory.chmod(0o1777)
        with pytest.raises(FerryError, match="others may write to it") as refused:
            use(daemon.directory)
        assert refused.value.code == "directory_refused"
        assert list((daemon.directory / "workers").iterdir()) == []
        daemon.directory.chmod(0o750)
        assert ask(daemon.directory, control.GetStatus()).workers == 0


@pytest.mark.parametrize("use", USES, ids=("worker", "operator"))
def test_the_default_is_no_link_that_somebody_has_laid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object]
) -> None:
    link = tmp_path / "link"
    with LiveDaemon(tmp_path / "a") as daemon:
        link.symlink_to(daemon.directory)
        assert ask(link, control.GetStatus()).workers == 0  # named: it is the caller's choice
        monkeypatch.setattr(runtime_dir, "default_runtime_dir", lambda: link)
        with pytest.raises(FerryError, match="is no directory") as refused:
            use(link)
        assert refused.value.code == "directory_refused"


@pytest.mark.parametrize("use", USES, ids=("worker", "operator"))
def test_one_that_is_not_there_is_nobodys(tmp_path: Path, use: Callable[[Path], object]) -> None:
    with pytest.raises(FerryError) as refused:
        use(tmp_path / "none")
    assert refused.value.code == "daemon_unreachable"
