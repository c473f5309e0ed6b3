"""Phi-3 and 4."""

from qsharded.models import layer_patterns
from qsharded.models.families.family import Family, Settings, Values
from qsharded.models.rope import RopeConfig


def _phi3(values: Values) -> Settings:
    return {"fused_qkv": True, "mlp": "fused", "layer_windows": layer_patterns.everywhere(values)}


def _phi3_rope(values: Values) -> Settings:
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):  # names that longrope had before
        given |= {"rope_type": "longrope"}
    if (given.get("rope_type") or given.get("type")) == "longrope":
        given["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    else:
        given.pop("original_max_position_embeddings", None)
    return {"rope": RopeConfig.of(given, values)}


FAMILIES = {
    "phi3": Family(
        "Phi-3, Phi-4",
        "Phi3ForCausalLM",
        "qkv_proj and gate_up_proj; partial rotary embedding; longrope, chosen by each document's length",
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": None,
        },
        settings=_phi3,
        ropes=_phi3_rope,
        neutral={
            "resid_pdrop": (0,),
            "embd_pdrop": (0,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
            "lm_head_bias": (False,),
        },
        own_code="modeling_phi3",
        partial_rotary=True,
    ),
}
