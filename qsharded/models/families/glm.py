"""GLM-4 and ERNIE 4.5, whose rotary embedding pairs neighbours, and GLM-4.5."""

from qsharded.models.config import NormNames
from qsharded.models.families.family import Family, Settings, Values, mixture, rope_parameters
from qsharded.models.rope import RopeConfig


def _glm4(values: Values) -> Settings:
    norms = NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return {"norms": norms, "mlp": "fused", "rope_interleaved": True, "qkv_bias": bool(values["attention_bias"])}


def _glm4_moe(values: Values) -> Settings:
    layers, dense = values["num_hidden_layers"], values["first_k_dense_replace"] or 0
    experts = mixture(
        values,
        experts="n_routed_experts",
        size="moe_intermediate_size",
        router="sigmoid",
        normalised=bool(values["norm_topk_prob"]),
        scaling=values["routed_scaling_factor"] or 1.0,
        groups=values["n_group"] or 1,
        chosen_groups=values["topk_group"] or 1,
        shared_size=values["moe_intermediate_size"] * (values["n_shared_experts"] or 0),
    )
    return {
        "qkv_bias": bool(values["attention_bias"]),
        "qk_norm": bool(values["use_qk_norm"]),
        "mixture": experts,
        "sparse_layers": tuple(layer >= dense for layer in range(layers)),
        "further_layers": values["num_nextn_predict_layers"] or 0,
    }


def _ernie(values: Values) -> Settings:
    bias = bool(values["use_bias"])
    return {"rope_interleaved": True, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}


def _ernie_rope(values: Values) -> Settings:
    return {"rope": RopeConfig.of(rope_parameters(values), {**values, "rope_theta": values.get("rope_theta") or 5e5})}


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
