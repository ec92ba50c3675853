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
MODEL = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast
path, kind, head_dim = sys.argv[1:]
words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(512)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(path)
torch.manual_seed(7)
common = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=int(head_dim), max_position_embeddings=32768,
    initializer_range=0.2, dtype=torch.float32,
)
if kind == "llama":
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **common))
else:
    layers = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        num_hidden_layers=4, layer_types=layers, sliding_window=256, query_pre_attn_scalar=32,
        **common,
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


def make_model(directory: Path, kind: str = "llama", head_dim: int = 32) -> Path:
    """A random model whose tokens tell when its cache is wrong: initialised wide.

    ``kind``: llama, or gemma3, half of whose layers look back 256 tokens only.
    """
    command = [sys.executable, "-c", MODEL, str(directory), kind, str(head_dim)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return directory


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
        self, log: Path, model: Path, transfer: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Start it; ``wait`` until it is there."""
        told = {
            "dtype": "float32",
            "max_model_len": 24_576,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_batched_tokens": 2048,
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
                env={**os.environ, **ENVIRONMENT},
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
        self, prompt: list[int], max_tokens: int = 16, params: dict[str, Any] | None = None
    ) -> "Answer":
        """Begin to generate."""
        return self._say(prompt=prompt, max_tokens=max_tokens, params=params)

    def abort(self, answer: "Answer") -> None:
        """Abort what was begun."""
        self._write({"abort": answer.name})

    def blocks_are_free(self) -> bool:
        """Whether no request holds a block; the prefix cache is empty afterwards, if so."""
        return bool(self._say(blocks=True).result()["are_free"])

    def preempt(self) -> bool:
        """Take all blocks from all requests, which begin anew; whether there were any."""
        return bool(self._say(preempt=True).result()["are_preempted"])

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
