"""What of SGLang's cannot be carried, or was not seen to work: refused when an engine starts.

Imports nothing of SGLang.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

ALLOW = "KVFERRY_ALLOW_UNTRIED"
UNTRIED = {
    "disaggregation_decode_enable_offload_kvcache": "decode's cache in host memory",
    "disaggregation_decode_enable_radix_cache": "decode's prefix cache",
    "enable_hierarchical_cache": "a hierarchical cache",
    "enable_hisparse": "hierarchical sparse attention",
    "enable_lmcache": "LMCache beside it",
    "enable_lora": "LoRA adapters",
    "enable_unified_memory": "unified memory",
    "lora_paths": "LoRA adapters",
    "speculative_algorithm": "speculative decoding",
}
HOST_RECEIVE = "disaggregation_decode_host_receive_threshold"
logger = logging.getLogger("sglang.kvferry")


def check_tried(words: str) -> None:
    """ValueError for what nobody saw work, unless the environment wants it tried."""
    if os.environ.get(ALLOW) != "1":
        raise ValueError(
            f"kvferry was not tried with {words} in SGLang; to try it all the same set {ALLOW}=1"
        )
    logger.warning("kvferry was not tried with %s in SGLang", words)


def check_arguments(arguments: Any) -> None:
    """ValueError names the first of SGLang's server arguments that cannot be had."""
    for name, words in UNTRIED.items():
        if getattr(arguments, name):
            check_tried(f"{words} (--{name.replace('_', '-')})")
    if getattr(arguments, HOST_RECEIVE) < 1:
        option = HOST_RECEIVE.replace("_", "-")
        raise ValueError(f"kvferry fetches into the device's pool only: drop --{option}")


def check_parallelism(kinds: Mapping[str, int]) -> None:
    """ValueError names the first kind that is asked for. Tensor-parallel ranks are one transfer."""
    for name, size in kinds.items():
        if size > 1:
            raise ValueError(f"kvferry does not support {name} parallelism above 1 in SGLang")


def check_state(kinds: Iterable[str]) -> None:
    """ValueError names state that is not of tokens."""
    for kind in kinds:
        if kind != "swa":
            raise ValueError(f"kvferry does not carry {kind} state of SGLang's")
