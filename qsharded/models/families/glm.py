"""GLM-4 and ERNIE 4.5, whose rotary embedding pairs neighbours."""

from qsharded.models.config import NormNames
from qsharded.models.families.family import Family, Settings, Values, rope_parameters
from qsharded.models.rope import RopeConfig


def _glm4(values: Values) -> Settings:
    norms = NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return {"norms": norms, "mlp": "fused", "rope_interleaved": True, "qkv_bias": bool(values["attention_bias"])}


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
