"""What a payload of SGLang's is of: which model computed it, and of which prompt."""

import os
from typing import Any

from kvferry_client.model_identity import MODEL_FIELDS, PROMPT, config_of, prompt_of, weights_of

TOLD = "KVFERRY_MODEL_FINGERPRINT"
# SGLang writes these into what it has read of a model: how this engine serves it, not what it is.
SERVING = ("context_len", "encoder_only", "language_only", "language_model_only")


def model_identity(server_args: Any, model_config: Any, pool: Any) -> dict[str, str]:
    """A short text for each of ``MODEL_FIELDS``; what the environment tells replaces all."""
    told = os.environ.get(TOLD)
    if told:  # an empty one is none
        return {f"model.{name}": told for name in MODEL_FIELDS}
    config = model_config.hf_config.to_dict()
    found = {
        "weights": weights_of(server_args.model_path, server_args.revision),
        "config": config_of({name: one for name, one in config.items() if name not in SERVING}),
        "quantization": str(model_config.quantization),
        "cache_dtype": str(pool.dtype).removeprefix("torch."),
    }
    return {f"model.{name}": found[name] for name in MODEL_FIELDS}


def prompt_identity(request: Any) -> dict[str, str]:
    """Of a request of SGLang's: its tokens, and not its images, of which sides may know less."""
    return {PROMPT: prompt_of(request.origin_input_ids_unpadded)}
