"""What real engines have in common: tiny models on disk, and a process that is told what to do.

An engine's own folder has the process's program and what the engine is started with.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

START_S = 300.0
ANSWER_S = 180.0
NO_CHANGES: Mapping[str, str] = MappingProxyType({})
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


def make_model(
    directory: Path,
    kind: str = "llama",
    seed: int = 7,
    environment: Mapping[str, str] = NO_CHANGES,
    **shape: int,
) -> Path:
    """A random model whose tokens tell when its cache is wrong: initialised wide.

    ``kind``: llama; gemma3, half of whose layers look back 256 tokens only.
    ``environment``: what transformers needs beside this process's. ``shape``: of the model's
    configuration, what is to be another.
    """
    command = [sys.executable, "-c", MODEL, str(directory), kind, str(seed), json.dumps(shape)]
    subprocess.run(
        command, check=True, capture_output=True, timeout=120, env={**os.environ, **environment}
    )
    return directory


class EngineProcess:
    """One engine. Leaves no process behind, whatever happens."""

    def __init__(
        self,
        driver: Path,
        log: Path,
        model: Path,
        options: dict[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        """Start it; ``wait`` until it is there. ``driver``: the program, of JSON lines."""
        self._numbers = itertools.count()
        self._answers: dict[str, Future[dict[str, Any]]] = {}
        self._ready = threading.Event()
        self.log_path = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(driver), str(model), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
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

    def pause(self) -> None:
        """Let all its processes stand still."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def log(self) -> str:
        """What it wrote to stderr."""
        return self.log_path.read_text(errors="replace")

    def abort(self, answer: "Answer") -> None:
        """Abort what was begun."""
        self._write({"abort": answer.name})

    def blocks_are_free(self) -> bool:
        """Whether no request holds a block; the prefix cache is empty afterwards, if so."""
        return bool(self._say(blocks=True).result()["are_free"])

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
            if not line.startswith('{"'):
                continue  # something of the engine's prints
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
