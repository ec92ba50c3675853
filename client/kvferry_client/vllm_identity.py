"""What a payload is of: which model computed it, and of which prompt. Prefill and decode compare it.

Weights lie in directories of any name, so a directory is told by its files: their names and sizes,
and a few kilobytes of each. What is loaded later (a weight update while the engine runs) is not seen.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_BYTES = 4096
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
VOLATILE = ("transformers_version", "dtype", "torch_dtype", "architectures")
MODEL_FIELDS = ("weights", "config", "quantization", "cache_dtype")
CACHE_DTYPE = "model.cache_dtype"
PROMPT = "prompt"
NAMES = (*(f"model.{name}" for name in MODEL_FIELDS), PROMPT)


def model_identity(vllm_config: Any, extra: Mapping[str, Any]) -> dict[str, str]:
    """A short text for each of ``MODEL_FIELDS``; ``model_fingerprint`` of ``extra`` replaces all."""
    told = extra.get("model_fingerprint")
    if told is not None:
        return {f"model.{name}": str(told) for name in MODEL_FIELDS}
    model = vllm_config.model_config
    found = {
        "weights": _weights(model),
        "config": _digest(json.dumps(_stable(model.hf_config.to_dict()), default=str).encode()),
        "quantization": str(model.quantization),
        "cache_dtype": _cache_dtype(vllm_config.cache_config.cache_dtype, model.dtype),
    }
    return {f"model.{name}": found[name] for name in MODEL_FIELDS}


def prompt_identity(request: Any) -> str:
    """Of a vLLM request: its tokens and its LoRA adapter.

    Not its images: where vLLM caches none, it gives them names that no other engine has.
    """
    lora = request.lora_request.lora_name if request.lora_request else ""
    tokens = np.asarray(request.prompt_token_ids or [], np.int64)
    return _digest(lora.encode() + b"\0" + tokens.tobytes())


def _cache_dtype(told: str, model_dtype: Any) -> str:
    """What an engine's cache holds, whichever of its names it was told by."""
    told = {"auto": str(model_dtype), "fp8": "fp8_e4m3"}.get(told, told)
    return told.removeprefix("torch.")


def _weights(model: Any) -> str:
    """The files of a directory, or a repository's name and revision."""
    directory = Path(model.model)
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    files = [file for file in files if file.suffix in WEIGHTS]
    if not files:
        return f"{model.model}@{model.revision}"
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                opened.seek(place)
                found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def _stable(config: Any) -> Any:
    """A configuration without what says nothing of the model."""
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
