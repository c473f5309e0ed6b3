"""config.json files of models with latent attention, as they are published, and what is refused of them by key."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mixtures.shapes import DEEPSEEK_V2_LITE, GLM_4_7_FLASH
from qsharded.checkpoint import load_model
from qsharded.models import CausalLM, ModelConfig
from qsharded.models.choice import read_config
from tests.models.parity import case
from tests.models.variants import VARIANTS

_OF_THE_AUTHORS_CODE = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
}
_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_V2 = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": None}
_V2_LITE = (
    _OF_THE_AUTHORS_CODE
    | DEEPSEEK_V2_LITE
    | _V2
    | {"n_group": 1, "topk_group": 1, "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": _OF_THE_AUTHORS_CODE
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 163_840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    "DeepSeek-V2-Lite": _V2_LITE,
    "DeepSeek-V2": _V2_LITE
    | {
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "topk_method": "group_limited_greedy",
        "n_routed_experts": 160,
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
    },
    "Moonlight-16B-A3B": _OF_THE_AUTHORS_CODE
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 163_840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50_000.0,
    },
    "GLM-4.7-Flash": GLM_4_7_FLASH
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        "rope_scaling": None,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("DeepSeek-V3", 671),  # arXiv:2412.19437
        ("DeepSeek-V2", 236),  # arXiv:2405.04434
        ("DeepSeek-V2-Lite", 15.7),  # the same, appendix B
        ("Moonlight-16B-A3B", 16),  # its model card, as of the next
        ("GLM-4.7-Flash", 30),
    ],
)
def test_published_models_have_as_many_parameters_as_their_authors_say(model: str, billions: float) -> None:
    config = ModelConfig.from_hf(PUBLISHED[model])
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    assert round(count / 1e9, 1 if billions % 1 else 0) == billions


def test_yarns_temperature_is_in_the_scores_and_not_in_the_tables() -> None:
    """m_scale squared, by DeepSeek-V3's own code: 0.1 ln 40 + 1."""
    config = ModelConfig.from_hf(PUBLISHED["DeepSeek-V3"])
    assert config.attention_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    assert ModelConfig.from_hf(PUBLISHED["GLM-4.7-Flash"]).attention_scale == pytest.approx(1 / 16)


@pytest.mark.parametrize(
    ("variant", "changed", "message"),
    [
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank must be a whole number of at least 1"),
        ("deepseek_v3", {"v_head_dim": 0}, "v_head_dim"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even for rotary embedding, got 7"),
        ("deepseek_v3", {"head_dim": 24}, r"head_dim \(24\) must be qk_rope_head_dim \(8\)"),
        ("deepseek_v3", {"qk_head_dim": 16}, r"qk_head_dim \(16\) must be qk_nope_head_dim \+ qk_rope_head_dim \(24\)"),
        ("deepseek_v3", {"num_key_value_heads": 2}, r"num_key_value_heads \(2\) must be num_attention_heads \(4\)"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "'scoring_func' is 'softmax'; only 'sigmoid' is supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "'topk_method' is 'greedy'; only 'noaux_tc' is supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "'moe_layer_freq' is 2; only 1 is supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported: greedy, "),
        ("deepseek_v2", {"norm_topk_prob": True}, "'norm_topk_prob' is True; only False is supported"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok must be a whole number"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1 entries for 3 layers"),
        ("glm4_moe_lite", {"mlp_layer_types": ["moe"] * 3}, "mlp_layer_types: 'moe' is not supported"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "'first_k_dense_replace' is 2; only 1 is supported"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_is_refused_by_key(variant: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(VARIANTS[variant] | changed)


def test_weights_in_fp8_are_refused_by_name_and_random_ones_need_none(tmp_path: Path) -> None:
    stored = {"quantization_config": PUBLISHED["DeepSeek-V3"]["quantization_config"]}
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["deepseek_v3"] | stored))
    weights = case("deepseek_v3").checkpoint / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match="quant_method 'fp8' is not read here; give "):
        load_model(tmp_path, device="cpu")
    load_model(tmp_path, device="cpu", random_init=True)


def test_native_code_is_chosen() -> None:
    assert isinstance(read_config(PUBLISHED["DeepSeek-V2-Lite"]), ModelConfig)
