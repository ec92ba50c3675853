"""`kvferry size` counts the bytes that a cache of transformers really has."""

import pytest
import torch

from hf.models import CLASSES, config_of
from kvferry_client.transformers_cache import layout_of
from kvferry_daemon.sizing import cache_of


@pytest.mark.parametrize("name", CLASSES)
def test_a_token_has_the_bytes_of_all_planes(name: str) -> None:
    config = config_of(name, dtype=torch.bfloat16)
    assert cache_of(config.to_dict()).token_bytes == layout_of(config).token_bytes
