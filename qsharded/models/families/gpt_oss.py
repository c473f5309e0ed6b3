"""gpt-oss."""

from qsharded.models import layer_patterns
from qsharded.models.families.family import Family, Settings, Values, mixture, rope_parameters
from qsharded.models.rope import RopeConfig

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(values: Values) -> Settings:
    experts = mixture(
        values,
        experts="num_local_experts",
        size="intermediate_size",
        router="softmax of chosen",
        clamped=True,
        clamp_limit=values["swiglu_limit"] or 7.0,
        clamp_gain=values["swiglu_alpha"] or 1.702,
    )
    bias = bool(values["attention_bias"])
    alternate = [(layer_patterns.SLIDING, layer_patterns.FULL)[n % 2] for n in range(values["num_hidden_layers"])]
    return {
        "mixture": experts,
        "qkv_bias": bias,
        "o_bias": bias,
        "sinks": True,
        "layer_windows": layer_patterns.by_types(values, alternate),
    }


def _rope(values: Values) -> Settings:
    theta = values.get("rope_theta") or 150_000.0
    return {"rope": RopeConfig.of(rope_parameters(values) or _ROPE, {**values, "rope_theta": theta})}


FAMILIES = {
    "gpt_oss": Family(
        "gpt-oss",
        "GptOssForCausalLM",
        "mixtures of experts with biases and a clamped activation, also from MXFP4; attention sinks; every other layer "
        "has a sliding window",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            # what other keys say once more
            "experts_per_token": None,
            "initial_context_length": None,
        },
        settings=_gpt_oss,
        ropes=_rope,
    ),
}
