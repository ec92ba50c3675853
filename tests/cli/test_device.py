"""A daemon that is to serve a GPU on a machine that has none."""

from pathlib import Path

import pytest
import torch

from cli.processes import kvferry

EXIT_SERVE = 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_said_before_anything_is_made(tmp_path: Path) -> None:
    done = kvferry("serve", "--runtime-dir", tmp_path / "a", "--device", "cuda:0")
    assert (done.returncode, done.stdout) == (EXIT_SERVE, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvferry: cannot start: cuda:0")
    assert "set device=host" in line
    assert not (tmp_path / "a").exists()
