"""A pytest plugin that runs vLLM's own connector tests on ours: see docs/engines.md.

    make test-vllm-upstream

They build what they need with two helpers of theirs, which name NixlConnector and its params. Needs
``facebook/opt-125m/`` in the working directory, which this writes: its configuration alone.
"""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

HELPERS = "tests.v1.kv_connector.unit.utils"
SOURCE = "tcp://127.0.0.1:1"
UNIT = "tests/v1/kv_connector/unit"
FILES = (
    "test_remote_decode_lifecycle.py",
    "test_remote_prefill_lifecycle.py",
    "test_kv_load_failure_recovery.py",
    "test_error_propagation.py",
    "test_invalid_blocks_correctness.py",
    "test_cache_pollution_prevention.py",
)
CANNOT = {  # these fail, and have to: docs/engines.md says it at length
    "test_short_prompt_lifecycle": "looks for NIXL's params",
    "test_prefix_cache_lifecycle": "looks for NIXL's params",
    "test_p_side_chunked_prefill_mamba": "Mamba is refused",
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
    "torch_dtype": "float16",
}


def pytest_configure(config: pytest.Config) -> None:
    """Let the helpers name our connector and our params."""
    if not config.args or config.args == [str(config.invocation_params.dir)]:
        config.args = [f"{UNIT}/{name}" for name in FILES]
    model = Path("facebook/opt-125m")
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(OPT))
    helpers: Any = importlib.import_module(HELPERS)
    make_config, make_request = helpers.create_vllm_config, helpers.create_request
    make_scheduler = helpers.create_scheduler

    @functools.wraps(make_config)
    def create_vllm_config(*args: Any, **told: Any) -> Any:
        if told.get("kv_connector", "NixlConnector") == "NixlConnector":
            told["kv_connector"] = "KvferryConnector"
            told["kv_connector_module_path"] = "kvferry_client.vllm"
        return make_config(*args, **told)

    @functools.wraps(make_request)
    def create_request(*args: Any, **told: Any) -> Any:
        request = make_request(*args, **told)
        if request.kv_transfer_params is not None:
            request.kv_transfer_params |= {"transfer_id": request.request_id, "source": SOURCE}
        return request

    @functools.wraps(make_scheduler)
    def create_scheduler(*args: Any, **told: Any) -> Any:
        scheduler = make_scheduler(*args, **told)
        if type(scheduler.connector).__name__ == "KvferryConnector":
            from kvferry_client.vllm_messages import Address

            scheduler.connector.set_xfer_handshake_metadata({0: Address(SOURCE)})
        return scheduler

    helpers.create_vllm_config = create_vllm_config
    helpers.create_request = create_request
    helpers.create_scheduler = create_scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What cannot apply has to fail, or the table is out of date."""
    for item in items:
        why = CANNOT.get(getattr(item, "originalname", item.name))
        if why is not None:
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))
