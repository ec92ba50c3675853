"""What a payload of vLLM's is of: which model computed it, and of which prompt. Both sides compare it."""

from collections.abc import Mapping
from typing import Any

from kvferry_client.model_identity import MODEL_FIELDS, PROMPT, config_of, prompt_of, weights_of

CACHE_DTYPE = "model.cache_dtype"
NAMES = (*(f"model.{name}" for name in MODEL_FIELDS), PROMPT)


def model_identity(vllm_config: Any, extra: Mapping[str, Any]) -> dict[str, str]:
    """A short text for each of ``MODEL_FIELDS``; ``model_fingerprint`` of ``extra`` replaces all."""
    told = extra.get("model_fingerprint")
    if told not in (None, ""):
        return {f"model.{name}": str(told) for name in MODEL_FIELDS}
    model = vllm_config.model_config
    found = {
        "weights": weights_of(model.model, model.revision),
        "config": config_of(model.hf_config.to_dict()),
        "quantization": str(model.quantization),
        "cache_dtype": _cache_dtype(vllm_config.cache_config.cache_dtype, model.dtype),
    }
    return {f"model.{name}": found[name] for name in MODEL_FIELDS}


def prompt_identity(request: Any) -> str:
    """Of a vLLM request: its tokens and its LoRA adapter.

    Not its images: where vLLM caches none, it gives them names that no other engine has.
    """
    lora = request.lora_request.lora_name if request.lora_request else ""
    return prompt_of(request.prompt_token_ids or [], lora)


def _cache_dtype(told: str, model_dtype: Any) -> str:
    """What an engine's cache holds, whichever of its names it was told by."""
    told = {"auto": str(model_dtype), "fp8": "fp8_e4m3"}.get(told, told)
    return told.removeprefix("torch.")
