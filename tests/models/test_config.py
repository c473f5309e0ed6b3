import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qsharded.models import ModelConfig
from qsharded.models.config import declared_dtype
from qsharded.models.rope import RopeConfig
from tests.models.variants import VARIANTS

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
QWEN = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}

# config.json of published checkpoints, as their authors' transformers 4 wrote them.
PUBLISHED = {
    "Llama-2-7b": (
        {
            "_name_or_path": "meta-llama/Llama-2-7b-hf",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, rope=RopeConfig(original_length=4096)),
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        ModelConfig(
            128256,
            2048,
            8192,
            16,
            32,
            8,
            64,
            131072,
            1e-5,
            tie_word_embeddings=True,
            rope=RopeConfig("llama3", 500000.0, 32.0, 8192, 1.0, 4.0),
        ),
    ),
    "SmolLM2-135M": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 49152,
        },
        ModelConfig(
            49152,
            576,
            1536,
            30,
            9,
            3,
            64,
            8192,
            1e-5,
            tie_word_embeddings=True,
            rope=RopeConfig(rope_theta=100000, original_length=8192),
        ),
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        ModelConfig(
            32000,
            4096,
            14336,
            32,
            32,
            8,
            128,
            32768,
            1e-5,
            rope=RopeConfig(original_length=32768),
            layer_windows=(4096,) * 32,
        ),
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151646,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 1536,
            "initializer_range": 0.02,
            "intermediate_size": 8960,
            "max_position_embeddings": 131072,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.44.0",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        ModelConfig(
            151936,
            1536,
            8960,
            28,
            12,
            2,
            128,
            131072,
            qkv_bias=True,
            rope=RopeConfig(original_length=131072),
        ),
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        ModelConfig(
            151936,
            1024,
            3072,
            28,
            16,
            8,
            128,
            40960,
            tie_word_embeddings=True,
            qk_norm=True,
            rope=RopeConfig(rope_theta=1000000, original_length=40960),
        ),
    ),
}


# Of families that came later, what their authors wrote -> some of what it must become.
PUBLISHED_LATER = {
    "Phi-3-mini-4k-instruct": (
        {
            "_name_or_path": "Phi-3-mini-4k-instruct",
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "model_type": "phi3",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.2",
            "use_cache": True,
            "vocab_size": 32064,
        },
        {"fused_qkv": True, "head_dim": 96, "layer_windows": (2047,) * 32},
    ),
    "ERNIE-4.5-0.3B-PT": (
        {
            "architectures": ["Ernie4_5_ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_ernie4_5.Ernie4_5_Config",
                "AutoModel": "modeling_ernie4_5.Ernie4_5_Model",
                "AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM",
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 131072,
            "model_type": "ernie4_5",
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "num_hidden_layers": 18,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "use_cache": False,
            "vocab_size": 103424,
            "rope_theta": 500000,
            "use_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        {"rope_interleaved": True, "tie_word_embeddings": True, "qkv_bias": False},
    ),
    "gemma-3-4b-it": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        {
            "vocab_size": 262208,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "wrapper": "gemma3",
            "layer_windows": ((1024,) * 5 + (None,)) * 5 + (1024,) * 4,
            "rope": RopeConfig("linear", 1e6, 8.0, 131072),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_LATER)
def test_published_configs_of_later_families(name: str) -> None:
    raw, expected = PUBLISHED_LATER[name]
    config = ModelConfig.from_hf(raw)
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    raw, expected = PUBLISHED[name]
    assert ModelConfig.from_hf(raw) == expected


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None,) * 3),
        ({"sliding_window": 8}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (None, None, 8)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8,) * 3),
        ({"use_sliding_window": True, "sliding_window": 8}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 3),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (None, 8, None),
        ),
    ],
)
def test_qwen_windows(changes: dict, windows: tuple[int | None, ...]) -> None:
    assert ModelConfig.from_hf(QWEN | changes).layer_windows == windows


def test_mistral_window_defaults_as_in_transformers() -> None:
    mistral = LLAMA | {"model_type": "mistral", "num_attention_heads": 8}
    config = ModelConfig.from_hf(mistral)
    assert config.layer_windows == (4096,) * 3
    assert config.num_key_value_heads == 8
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).layer_windows == (None,) * 3


def test_llama_derives_heads_and_head_dim() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert ModelConfig.from_hf(LLAMA | {"num_key_value_heads": None, "head_dim": None}) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, granite"),
        ({}, "model_type None"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA | {"logit_softcap": 30.0}, r"'logit_softcap' \(30\.0\) is not known"),
        (LLAMA | {"sliding_window": 512}, r"'sliding_window' \(512\)"),
        (LLAMA | {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; only 'silu'"),
        (LLAMA | {"attention_dropout": 0.1}, r"'attention_dropout' is 0\.1; only 0 "),
        (LLAMA | {"partial_rotary_factor": 0.5}, r"'partial_rotary_factor' is 0\.5"),
        (LLAMA | {"rope_interleaved": True}, "'rope_interleaved' is True"),
        (LLAMA | {"pruned_heads": {"1": [0]}}, "'pruned_heads'"),
        (QWEN | {"use_mrope": True}, "'use_mrope' is True"),
        (QWEN | {"attention_bias": True}, "'attention_bias' is True"),
        (QWEN | {"layer_types": ["linear_attention"] * 3}, "'linear_attention' is not supported"),
        (QWEN | {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        (QWEN | {"layer_types": ["full_attention"] * 2}, "2 entries for 3 layers"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "no 'hidden_size'"),
        (LLAMA | {"num_key_value_heads": 3}, r"num_attention_heads \(4\).*num_key_value_heads \(3\)"),
        (LLAMA | {"head_dim": 7}, "head_dim must be even.*7"),
        (LLAMA | {"rope_scaling": {"rope_type": "proportional"}}, "rope_type 'proportional' is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' needs 'long_factor'"),
        (LLAMA | {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type 'su'"),
        ({"model_type": "gemma3", "text_config": {}, "audio_config": {"a": 1}}, "'audio_config'"),
        (
            {"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}},
            "'use_bidirectional_attention'",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "'attn_logit_softcapping'"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mamba"}}, "model_type 'mamba'"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs 'factor'"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' needs 'high_freq_factor'"),
        (LLAMA | {"rope_parameters": {"rope_theta": 1e4, "twist": 3}}, r"rope key 'twist' \(3\)"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope key 'full_attention'"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"'partial_rotary_factor' \(0\.5\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_named(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config)


def test_null_means_not_set() -> None:
    extra = {"something_new": None, "quantization_config": None, "rope_parameters": None, "layer_types": None}
    assert ModelConfig.from_hf(LLAMA | extra) == ModelConfig.from_hf(LLAMA)


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "ropes",
    [
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        {"rope_theta": 300.0, "rope_scaling": {"rope_type": "llama3", "type": "linear", **_LLAMA3}},
        {"rope_theta": 300.0, "rope_scaling": {"rope_type": "default", "type": "linear"}},
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 300.0, "rope_parameters": {"rope_type": "linear", "rope_theta": 70.0, "factor": 2.0}},
        {"rope_theta": 300.0, "rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "rope_theta": 70.0, "factor": 2.0},
        },
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "rope_theta": 70.0, "factor": 2.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    ],
    ids=str,
)
def test_of_doubled_spellings_of_the_rope_transformers_choice_counts(ropes: dict[str, Any], tmp_path: Path) -> None:
    described = LLAMA | {"rope_theta": None} | ropes
    (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in described.items() if v is not None}))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    ours = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text())).rope
    assert (ours.rope_type, ours.rope_theta) == (theirs["rope_type"], theirs["rope_theta"])
    assert ours.factor == theirs.get("factor", 1.0)
    assert ours.original_length == theirs.get("original_max_position_embeddings", LLAMA["max_position_embeddings"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({}, None),
    ],
    ids=str,
)
def test_of_both_names_of_the_dtype_the_newer_counts(
    said: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    assert declared_dtype(said) == expected
    described = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | said
    (tmp_path / "config.json").write_text(json.dumps(described))
    theirs = AutoConfig.from_pretrained(tmp_path).dtype
    assert theirs == (expected and getattr(torch, expected))


@pytest.mark.parametrize(
    ("variant", "changed", "message"),
    [
        ("qwen3_moe", {"num_experts": None}, "num_experts must be a whole number of at least 1"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "num_experts_per_tok must be from 1 to the 5 experts, got 6"),
        ("qwen3_moe", {"num_experts": "5"}, "num_experts"),
        ("glm4_moe", {"n_group": 4}, r"n_group \(4\) must divide the 6 experts"),
        ("glm4_moe", {"topk_group": 1}, r"topk_group \(1\) leave 2 of 6 experts"),
        ("glm4_moe", {"n_group": 6, "topk_group": 3}, "in groups of 2 and more"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 2}, "layer_types"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_by_key(variant: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(VARIANTS[variant] | changed)
