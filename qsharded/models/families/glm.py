"""GLM-4 and ERNIE 4.5, whose rotary embedding pairs neighbours, and GLM-4.5 and 4.7-Flash."""

from qsharded.models.config import NormNames
from qsharded.models.families.deepseek import LATENT, NEUTRAL, dense_first, latent_attention, sigmoid_mixture
from qsharded.models.families.family import Family, Settings, Values, rope_parameters
from qsharded.models.rope import RopeConfig


def _glm4(values: Values) -> Settings:
    norms = NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return {"norms": norms, "mlp": "fused", "rope_interleaved": True, "qkv_bias": bool(values["attention_bias"])}


def _glm4_moe(values: Values) -> Settings:
    return {
        "qkv_bias": bool(values["attention_bias"]),
        "qk_norm": bool(values["use_qk_norm"]),
        "mixture": sigmoid_mixture(values),
        "sparse_layers": dense_first(values),
        "further_layers": values["num_nextn_predict_layers"] or 0,
    }


def _glm4_moe_lite(values: Values) -> Settings:
    return latent_attention(values) | {
        "rope_interleaved": bool(values["rope_interleave"]),
        "mixture": sigmoid_mixture(values),
        "sparse_layers": _sparse(values),
        "further_layers": values["num_nextn_predict_layers"] or 0,
    }


def _sparse(values: Values) -> tuple[bool, ...]:
    """By ``mlp_layer_types``; without it all but the first layer, whatever first_k_dense_replace is."""
    layers = values["num_hidden_layers"]
    types = values["mlp_layer_types"] or [_DENSE, *[_SPARSE] * (layers - 1)]
    for unknown in sorted(set(types) - {_DENSE, _SPARSE}):
        raise ValueError(f"mlp_layer_types: {unknown!r} is not supported ({_DENSE} and {_SPARSE} are)")
    if len(types) != layers:
        raise ValueError(f"mlp_layer_types has {len(types)} entries for {layers} layers")
    return tuple(kind == _SPARSE for kind in types)


def _ernie(values: Values) -> Settings:
    bias = bool(values["use_bias"])
    return {"rope_interleaved": True, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}


def _ernie_rope(values: Values) -> Settings:
    return {"rope": RopeConfig.of(rope_parameters(values), {**values, "rope_theta": values.get("rope_theta") or 5e5})}


_DENSE, _SPARSE = "dense", "sparse"

FAMILIES = {
    "glm4": Family(
        "GLM-4 (0414)",
        "Glm4ForCausalLM",
        "gate_up_proj; norms before and after attention and MLP; half of each head is rotated, by neighbours",
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-7,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        settings=_glm4,
        partial_rotary=True,
    ),
    "glm4_moe": Family(
        "GLM-4.5",
        "Glm4MoeForCausalLM",
        "mixtures of experts beside a shared one, chosen by sigmoid and correction bias; half of each head is rotated",
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "use_qk_norm": False,
            "num_nextn_predict_layers": 1,
        },
        settings=_glm4_moe,
        partial_rotary=True,
    ),
    "glm4_moe_lite": Family(
        "GLM-4.7-Flash",
        "Glm4MoeLiteForCausalLM",
        "as DeepSeek V3",
        defaults={
            **LATENT,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "rms_norm_eps": 1e-5,
            "rope_interleave": True,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1536,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.8,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "mlp_layer_types": None,
            "num_nextn_predict_layers": 1,
        },
        settings=_glm4_moe_lite,
        neutral={**NEUTRAL, "topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "first_k_dense_replace": (1,)},
    ),
    "ernie4_5": Family(
        "ERNIE 4.5",
        "Ernie4_5ForCausalLM",
        "rotary embedding of neighbours",
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "use_bias": False,
        },
        settings=_ernie,
        own_code="modeling_ernie4_5",
        also=("Ernie4_5_ForCausalLM",),
        ropes=_ernie_rope,
    ),
}
