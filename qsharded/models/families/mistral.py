"""Mistral and Ministral."""

from qsharded.models import layer_patterns
from qsharded.models.families.family import Family, Settings, Values, mixture, rope_parameters
from qsharded.models.rope import RopeConfig


def _mistral(values: Values) -> Settings:
    return {"layer_windows": layer_patterns.everywhere(values)}


def _mixtral(values: Values) -> Settings:
    return _mistral(values) | {"mixture": mixture(values, experts="num_local_experts", size="intermediate_size")}


def _mixtral_rope(values: Values) -> Settings:
    return {"rope": RopeConfig.of(rope_parameters(values), {**values, "rope_theta": values.get("rope_theta") or 1e6})}


def _ministral(values: Values) -> Settings:
    otherwise = layer_patterns.every(0, values) if values["sliding_window"] else []
    return {"layer_windows": layer_patterns.by_types(values, otherwise)}


def _ministral3(values: Values) -> Settings:
    return _mistral(values) | _query_scale(values)


def _query_scale(values: Values) -> Settings:
    """The rotary embedding's parameters hold it."""
    given = rope_parameters(values) or _MINISTRAL3_ROPE
    beta, length = given.get("llama_4_scaling_beta"), given.get("original_max_position_embeddings")
    return {"query_scale_beta": beta, "query_scale_length": length} if beta else {}


def _ministral3_rope(values: Values) -> Settings:
    given = rope_parameters(values) or _MINISTRAL3_ROPE
    beside = ("llama_4_scaling_beta", "max_position_embeddings")  # of q, and a repetition
    return {"rope": RopeConfig.of({key: given[key] for key in given if key not in beside}, values)}


_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_MISTRAL_SHAPE = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


FAMILIES = {
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        "sliding window",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        settings=_mistral,
    ),
    "ministral": Family(
        "Ministral (2024)",
        "MinistralForCausalLM",
        "sliding windows in some layers",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None},
        settings=_ministral,
    ),
    "ministral3": Family(
        "Ministral 3",
        "Ministral3ForCausalLM",
        "yarn; q scaled by position beyond the original context",
        defaults={
            **_MISTRAL_SHAPE,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        settings=_ministral3,
        ropes=_ministral3_rope,
    ),
    "mixtral": Family(
        "Mixtral",
        "MixtralForCausalLM",
        "mixtures of experts",
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        settings=_mixtral,
        ropes=_mixtral_rope,
        neutral={"router_jitter_noise": (0,)},
    ),
}
