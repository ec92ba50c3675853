"""`kvferry size`: known models' bytes, and docs/sizing.md's table, which says what it answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cli.processes import kvferry
from kvferry_daemon.sizing import ModelRefused, cache_of, plan, read_model
from kvferry_proto.layout import Dtype

PAGE = (Path(__file__).parent.parent.parent / "docs" / "sizing.md").read_text()
GIB = 1 << 30


def grouped(layers: int, heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    """A config whose heads of queries share heads of keys and values."""
    names = {"num_hidden_layers": layers, "num_key_value_heads": heads, "head_dim": head_dim}
    return {"num_attention_heads": 64, "dtype": "bfloat16", **names, **more}


SLIDING = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3 8B": grouped(32, 8, 128),
    "Llama 3 70B": grouped(80, 8, 128),
    "Qwen3 32B": grouped(64, 8, 128),
    "Qwen3 235B A22B": grouped(94, 4, 128),
    "gpt-oss 120B": grouped(36, 8, 64, layer_types=["sliding_attention", "full_attention"] * 18),
    "Gemma 3 27B": grouped(62, 16, 128, layer_types=(SLIDING * 11)[:62]),
    "DeepSeek V3": grouped(61, 128, 128, kv_lora_rank=512, qk_rope_head_dim=64),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama 3 8B", 128 * 1024),
        ("Llama 3 70B", 320 * 1024),
        ("Qwen3 32B", 256 * 1024),
        ("gpt-oss 120B", 72 * 1024),
        ("Gemma 3 27B", 496 * 1024),
        ("DeepSeek V3", 61 * 576 * 2),
    ],
)
def test_a_known_models_token_has_the_bytes_it_is_known_for(name: str, expected: int) -> None:
    assert cache_of(MODELS[name]).token_bytes == expected


def test_what_a_config_leaves_out_is_worked_out() -> None:
    old = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512}
    cache = cache_of({**old, "torch_dtype": "float16"})
    assert (cache.heads, cache.elements, cache.dtype) == (8, 128, Dtype.FLOAT16)
    assert cache_of({**old, "num_key_value_heads": None, "dtype": "float32"}).token_bytes == 16384
    shared = grouped(10, 2, 64, num_kv_shared_layers=4, layer_types=["full_attention"] * 10)
    assert cache_of(shared).layers == 6


def test_the_caches_dtype_may_be_another_than_the_models() -> None:
    whole = cache_of(MODELS["Llama 3 8B"])
    assert cache_of(MODELS["Llama 3 8B"], dtype=Dtype.FLOAT8_E4M3FN).token_bytes * 2 == (
        whole.token_bytes
    )
    quantized = {**MODELS["Llama 3 8B"], "dtype": "float4"}
    with pytest.raises(ModelRefused, match="dtype: 'float4'"):
        cache_of(quantized)


@pytest.mark.parametrize(
    ("ranks", "heads", "copies"), [(1, 8, 1), (4, 2, 1), (8, 1, 1), (16, 1, 2)]
)
def test_ranks_share_heads_and_above_one_a_head_they_repeat_it(
    ranks: int, heads: int, copies: int
) -> None:
    model = MODELS["Llama 3 8B"]
    cache = cache_of(model, ranks)
    assert cache.heads == heads
    assert cache.token_bytes * ranks == cache_of(model).token_bytes * copies


def test_every_rank_keeps_a_latent_whole() -> None:
    assert cache_of(MODELS["DeepSeek V3"], 8) == cache_of(MODELS["DeepSeek V3"])


def test_sliding_layers_take_their_room_in_every_block() -> None:
    cache = cache_of(MODELS["Gemma 3 27B"])
    assert (cache.layers, cache.sliding_layers) == (62, 52)
    assert cache.token_bytes == cache_of(grouped(62, 16, 128)).token_bytes


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layer_types": ["linear_attention"] * 2}, "linear_attention layers keep no state"),
        ({"num_hidden_layers": None}, "num_hidden_layers: None"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True"),
        ({"num_key_value_heads": [8, 4]}, r"num_key_value_heads: \[8, 4\]"),
        ({"head_dim": 0}, "head_dim: 0"),
        ({"index_topk": 2048}, "index_topk: a cache of a kind"),
        ({"multi_query": True}, "multi_query: a cache of a kind"),
        ({"num_kv_heads": 8}, "num_kv_heads: a cache of a kind"),
        ({"multi_query_group_num": 2}, "multi_query_group_num: a cache of a kind"),
        ({"attn_layer_period": 8}, "attn_layer_period: a cache of a kind"),
        ({"full_attention_interval": 4}, "full_attention_interval: a cache of a kind"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern: a cache of a kind"),
        ({"attn_type_list": [0, 1]}, "attn_type_list: a cache of a kind"),
        ({"linear_attn_config": {}}, "linear_attn_config: a cache of a kind"),
        ({"swa_num_key_value_heads": 4}, "swa_num_key_value_heads: a cache of a kind"),
        ({"v_head_dim": 64}, "v_head_dim: a cache of a kind"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers: 2 of 2 layers"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers: -1 of 2 layers"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim: None"),
        ({"dtype": None}, "dtype: None"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        cache_of({**grouped(2, 8, 128), **changed})


def test_settings_under_which_all_layers_are_alike_are_counted() -> None:
    """As of models whose layers could differ, but do not; and a latent has no heads of values."""
    alike = {"multi_query": False, "attn_type_list": [1, 1], "swa_num_key_value_heads": 8}
    periodic = {"full_attention_interval": 1, "layer_types": ["full_attention"] * 2}
    model = grouped(2, 8, 128, v_head_dim=128, **alike, **periodic)
    assert cache_of(model) == cache_of(grouped(2, 8, 128))
    latent = MODELS["DeepSeek V3"]
    assert cache_of({**latent, "v_head_dim": 64}) == cache_of(latent)


def test_a_multimodal_model_is_sized_by_its_language_part(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    text = {k: v for k, v in MODELS["Llama 3 8B"].items() if k != "dtype"}
    vision = {"num_hidden_layers": 99}
    whole = {"dtype": "bfloat16", "text_config": text, "vision_config": vision}
    path.write_text(json.dumps(whole))
    assert cache_of(read_model(path)) == cache_of(MODELS["Llama 3 8B"])


def test_half_of_a_window_is_what_the_link_brings_until_the_resume() -> None:
    cache = cache_of(MODELS["Llama 3 8B"])
    found = plan(cache, link_gbit=100, concurrent=3, ranks=1, resume_ms=50)
    half_bytes = found.window_bytes / 2
    assert 12.5e9 * 0.050 <= half_bytes < 12.5e9 * 0.050 + found.block_bytes
    assert found.window_tokens % 128 == 0
    assert found.role_bytes == 3 * found.window_bytes
    slow = plan(cache, link_gbit=1, concurrent=3, ranks=1, resume_ms=50)
    assert slow.window_tokens == 2048


def test_the_verb_answers_in_words_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Gemma 3 27B"]))
    done = kvferry("size", "--model", path, "--link-gbit", "400", "--ranks", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "507,904 bytes a token in all ranks; in each 62 layers of 2 KV heads" in done.stdout
    assert "52 layers slide" in done.stdout
    answer = json.loads(kvferry("size", "--model", path, "--json").stdout)
    assert answer["schema"] == "kvferry/size/1"
    assert answer["plan"]["token_bytes"] == 507_904
    assert answer["cache"]["sliding_layers"] == 52


def test_the_caches_dtype_is_named_as_in_the_page(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Llama 3 8B"]))
    (words,) = re.findall(r"`(--dtype .*?)`", PAGE)
    answer = kvferry("size", "--model", path, "--json", *words.split())
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["plan"]["token_bytes"] == 64 * 1024


def test_the_settings_it_prints_are_a_config_that_a_daemon_takes(tmp_path: Path) -> None:
    model, config = tmp_path / "config.json", tmp_path / "kvferry.toml"
    model.write_text(json.dumps(MODELS["Llama 3 8B"]))
    _, _, settings = kvferry("size", "--model", model).stdout.partition("\n\n")
    config.write_text(settings)
    answer = kvferry("config", "check", "--config", config, "--json")
    assert json.loads(answer.stdout)["settings"]["window_tokens"] == 9600


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read as JSON"), ("[]", "holds a list"), ("{}", "num_hidden_layers: None")],
)
def test_a_file_that_is_no_config_is_a_wrong_usage(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    done = kvferry("size", "--model", path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize("name", MODELS)
def test_the_pages_table_says_what_the_command_does(name: str) -> None:
    cache = cache_of(MODELS[name])
    links = [
        plan(cache, link_gbit=gbit, concurrent=16, ranks=1, resume_ms=50) for gbit in (10, 100, 400)
    ]
    windows = " | ".join(f"{found.window_tokens:,}" for found in links)
    pool = f"{links[1].role_bytes / GIB:.1f} GiB"
    assert f"| {name} | {cache.token_bytes:,} | {windows} | {pool} |" in PAGE.splitlines()


def test_the_page_shows_a_session_as_it_is(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```console\n\$ kvferry (size .*?)\n(.*?)```", PAGE, re.DOTALL)
    command, expected = shown
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Llama 3 8B"]))
    words = [str(tmp_path / w) if w == "config.json" else w for w in command.split()]
    assert kvferry(*words).stdout == expected
