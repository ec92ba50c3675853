"""vLLM engines in process groups of their own, and a tiny model made on disk."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

START_S = 240.0
ANSWER_S = 180.0
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
MODEL = """
import json, sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast
path, kind, seed, shape = sys.argv[1:]
words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(512)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(path)
torch.manual_seed(int(seed))
common = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=32768, num_hidden_layers=2,
    initializer_range=0.2, dtype=torch.float32,
) | json.loads(shape)
if kind == "llama":
    model = LlamaForCausalLM(LlamaConfig(**common))
else:
    layers = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        layer_types=layers, sliding_window=256, query_pre_attn_scalar=32,
        **(common | dict(num_hidden_layers=4)),
    )
    model = Gemma3ForCausalLM(config)
model.save_pretrained(path)
"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for our lines
    "VLLM_NO_USAGE_STATS": "1",
}


def make_model(directory: Path, kind: str = "llama", seed: int = 7, **shape: int) -> Path:
    """A random model whose tokens tell when its cache is wrong: initialised wide.

    ``kind``: llama, or gemma3, half of whose layers look back 256 tokens only.
    ``shape``: of its configuration, what is to be another.
    """
    command = [sys.executable, "-c", MODEL, str(directory), kind, str(seed), json.dumps(shape)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return directory


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


class Engine:
    """One engine. Leaves no process behind, whatever happens."""

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
        self._numbers = itertools.count()
        self._answers: dict[str, Future[dict[str, Any]]] = {}
        self._ready = threading.Event()
        self.log_path = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVER), str(model), json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def wait(self) -> Self:
        """Until it takes requests."""
        assert self._ready.wait(START_S), self.log()[-4000:]
        assert self.process.poll() is None, self.log()[-4000:]
        return self

    def kill(self) -> None:
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def log(self) -> str:
        """What it wrote to stderr."""
        return self.log_path.read_text(errors="replace")

    def generate(
        self,
        prompt: list[int],
        max_tokens: int = 16,
        params: dict[str, Any] | None = None,
        n: int = 1,
        **of_items: Any,
    ) -> "Answer":
        """Begin to generate, ``n`` samples; ``of_items``: ``sounds`` and ``items`` of an encoder."""
        return self._say(prompt=prompt, max_tokens=max_tokens, params=params, n=n, **of_items)

    def abort(self, answer: "Answer") -> None:
        """Abort what was begun."""
        self._write({"abort": answer.name})

    def blocks_are_free(self) -> bool:
        """Whether no request holds a block; the prefix cache is empty afterwards, if so."""
        return bool(self._say(blocks=True).result()["are_free"])

    def preempt(self) -> bool:
        """Take all blocks from all requests, which begin anew; whether there were any."""
        return bool(self._say(preempt=True).result()["are_preempted"])

    def forget_items(self) -> None:
        """Empty the encoder's cache."""
        self._say(forget_items=True).result()

    def metrics(self) -> dict[str, float]:
        """What Prometheus is told of kvferry."""
        return dict(self._say(metrics=True).result()["metrics"])

    def _say(self, **told: Any) -> "Answer":
        name = f"request-{next(self._numbers)}"
        answer: Future[dict[str, Any]] = Future()
        self._answers[name] = answer
        self._write({"id": name, **told})
        return Answer(name, answer)

    def _write(self, told: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self._ready.set()
            else:
                self._answers.pop(said["id"]).set_result(said)
        self._ready.set()  # or somebody waits for the dead
        for answer in self._answers.values():
            answer.set_result({"error": "the engine ended"})


class Answer:
    """What a request will have come to."""

    def __init__(self, name: str, future: Future[dict[str, Any]]) -> None:
        self.name = name
        self._future = future

    def result(self) -> dict[str, Any]:
        """All of it."""
        return self._future.result(ANSWER_S)

    @property
    def tokens(self) -> list[int]:
        """The tokens that were generated."""
        said = self.result()
        assert "error" not in said, said
        assert said["reason"] == "length", said
        return list(said["tokens"])
