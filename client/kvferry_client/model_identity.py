"""What tells a model and a prompt from others, whichever engine loads them. Imports nothing of one.

Weights lie in directories of any name, so a directory is told by its files: their names and sizes,
and a few kilobytes of each. What is loaded later (a weight update while the engine runs) is not seen.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODEL_FIELDS = ("weights", "config", "quantization", "cache_dtype")
PROMPT = "prompt"  # the part of an identity that is the request's own
SAMPLE_BYTES = 4096
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
VOLATILE = ("transformers_version", "dtype", "torch_dtype", "architectures")


def weights_of(model: str, revision: str | None) -> str:
    """The files of a directory, or a repository's name and revision."""
    directory = Path(model)
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    files = [file for file in files if file.suffix in WEIGHTS]
    if not files:
        return f"{model}@{revision}"
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                opened.seek(place)
                found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def config_of(config: Mapping[str, Any]) -> str:
    """A configuration, as a dictionary, without what says nothing of the model."""
    return _digest(json.dumps(_stable(config), default=str).encode())


def prompt_of(tokens: Sequence[int], adapter: str = "") -> str:
    """A prompt's tokens, and what else changes their cache: a LoRA adapter's name."""
    return _digest(adapter.encode() + b"\0" + np.asarray(tokens, np.int64).tobytes())


def _stable(config: Any) -> Any:
    if isinstance(config, Mapping):
        kept = {str(key): _stable(value) for key, value in config.items()}
        return {
            key: kept[key]
            for key in sorted(kept)
            if not key.startswith("_") and key not in VOLATILE
        }
    return [_stable(one) for one in config] if isinstance(config, list | tuple) else config


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
