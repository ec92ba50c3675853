"""vLLM engines in process groups of their own, and what their connectors are told."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from engine_live import Answer, EngineProcess, make_model

__all__ = [
    "Answer", "Engine", "connector", "encoder_connector", "make_model", "make_sounds_model",
]  # fmt: skip
DRIVER = Path(__file__).with_name("engine_process.py")
SOUNDS = """
import sys, torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioProcessor, Qwen2Config
from transformers import PreTrainedTokenizerFast, Qwen2AudioForConditionalGeneration
from transformers import WhisperFeatureExtractor
path = sys.argv[1]
marks = ["<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"]
vocabulary = {name: n for n, name in enumerate([*(f"t{n}" for n in range(509)), *marks])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="t0", pad_token="t1", additional_special_tokens=marks
)
torch.manual_seed(7)
audio = Qwen2AudioEncoderConfig(
    d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16,
    max_source_positions=1500, initializer_range=0.2,
)
text = Qwen2Config(
    vocab_size=512, hidden_size=128, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=8192,
    initializer_range=0.2, use_sliding_window=False,
)
config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=511)
Qwen2AudioForConditionalGeneration(config).float().save_pretrained(path)
Qwen2AudioProcessor(
    feature_extractor=WhisperFeatureExtractor(feature_size=16), tokenizer=tokenizer
).save_pretrained(path)
weights = load_file(path + "/model.safetensors")  # vLLM knows them by their older names
save_file(
    {k.replace("language_model.model.model.", "language_model.model."): v for k, v in weights.items()},
    path + "/model.safetensors", metadata={"format": "pt"},
)
"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for our lines
    "VLLM_NO_USAGE_STATS": "1",
}


def make_sounds_model(directory: Path) -> Path:
    """A random model that hears: an encoder, and a language model behind it."""
    command = [sys.executable, "-c", SOUNDS, str(directory)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return directory


def encoder_connector(directory: Path, role: str, **options: Any) -> dict[str, Any]:
    """What ``--ec-transfer-config`` says; ``role``: producer or consumer."""
    return {
        "ec_connector": "KvferryEncoderConnector",
        "ec_connector_module_path": "kvferry_client.vllm_encoder",
        "ec_role": f"ec_{role}",
        "ec_connector_extra_config": {"runtime_dir": str(directory), **options},
    }


def connector(
    directory: Path, module: str = "kvferry_client.vllm", **options: Any
) -> dict[str, Any]:
    """What ``--kv-transfer-config`` says; ``directory``: the daemon's."""
    policy = options.pop("policy", "fail")
    return {
        "kv_connector": "KvferryConnector",
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"runtime_dir": str(directory), **options},
    }


class Engine(EngineProcess):
    """One engine of vLLM's."""

    def __init__(
        self,
        log: Path,
        model: Path,
        transfer: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Start it; ``wait`` until it is there."""
        told = {
            "dtype": "float32",
            "max_model_len": 24_576,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_batched_tokens": 2048,
            "skip_tokenizer_init": True,
            "kv_transfer_config": transfer,
            **options,
        }
        super().__init__(DRIVER, log, model, told, {**ENVIRONMENT, **(environment or {})})

    def generate(
        self,
        prompt: list[int],
        max_tokens: int = 16,
        params: dict[str, Any] | None = None,
        n: int = 1,
        **of_items: Any,
    ) -> Answer:
        """Begin to generate, ``n`` samples; ``of_items``: ``sounds`` or ``names``, and ``items`` of an encoder."""
        return self._say(prompt=prompt, max_tokens=max_tokens, params=params, n=n, **of_items)

    def preempt(self) -> bool:
        """Take all blocks from all requests, which begin anew; whether there were any."""
        return bool(self._say(preempt=True).result()["are_preempted"])

    def forget_items(self) -> None:
        """Empty the encoder's cache."""
        self._say(forget_items=True).result()

    def metrics(self) -> dict[str, float]:
        """What Prometheus is told of kvferry."""
        return dict(self._say(metrics=True).result()["metrics"])
