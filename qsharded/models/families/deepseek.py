"""DeepSeek V2 and V3, with Moonlight and others of their architecture; GLM's later mixtures read like these."""

from qsharded.models.families.family import Family, Settings, Values, mixture, rope_parameters
from qsharded.models.layer_shapes import ExpertMixture, LatentAttention
from qsharded.models.rope import RopeConfig, yarn_temperature


def sigmoid_mixture(values: Values) -> ExpertMixture:
    """Experts that a sigmoid and a correction bias choose, beside shared ones: DeepSeek-V3's and GLM-4.5's."""
    normalised = bool(values["norm_topk_prob"])
    return _mixture(values, router="sigmoid", normalised=normalised, **_groups(values))


def _groups(values: Values) -> Settings:
    return {"groups": values["n_group"] or 1, "chosen_groups": values["topk_group"] or 1}


def _mixture(values: Values, **settings: object) -> ExpertMixture:
    return mixture(
        values,
        experts="n_routed_experts",
        size="moe_intermediate_size",
        scaling=values["routed_scaling_factor"] or 1.0,
        shared_size=values["moe_intermediate_size"] * (values["n_shared_experts"] or 0),
        **settings,
    )


def dense_first(values: Values) -> tuple[bool, ...]:
    """Whether each layer has experts: all but the first ``first_k_dense_replace``."""
    dense = values["first_k_dense_replace"] or 0
    return tuple(layer >= dense for layer in range(values["num_hidden_layers"]))


def latent_attention(values: Values) -> Settings:
    """Its shape, scale and biases.

    Raises:
        ValueError: a dim is not given, or what config.json repeats of the others contradicts them.
    """
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if not values[key]:
            raise ValueError(f"{key} must be a whole number of at least 1 in latent attention, got {values[key]!r}")
    latent = LatentAttention(
        query_rank=values["q_lora_rank"],
        kv_rank=values["kv_lora_rank"],
        content_dim=values["qk_nope_head_dim"],
        rope_dim=values["qk_rope_head_dim"],
        value_dim=values["v_head_dim"],
    )
    _check_repeated(values, "head_dim", latent.rope_dim, "qk_rope_head_dim")
    _check_repeated(values, "qk_head_dim", latent.head_dim, "qk_nope_head_dim + qk_rope_head_dim")
    _check_repeated(values, "num_key_value_heads", values["num_attention_heads"], "num_attention_heads")
    bias = bool(values["attention_bias"])
    return {
        "latent": latent,
        "head_dim": latent.head_dim,
        "attention_scale": _scale(latent, RopeConfig.from_hf(values), rope_parameters(values)),
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _check_repeated(values: Values, key: str, expected: int, origin: str) -> None:
    if values[key] not in (None, expected):
        raise ValueError(f"{key} ({values[key]}) must be {origin} ({expected}) in latent attention, or be left out")


def _scale(latent: LatentAttention, rope: RopeConfig, given: Values) -> float:
    """Of the scores: a stretched rotary embedding's temperature is in it twice, once for q and once for k."""
    stretched = rope.rope_type != "default" and given.get("mscale_all_dim")
    temperature = yarn_temperature(rope.factor, given["mscale_all_dim"]) if stretched else 1.0
    return float(latent.head_dim**-0.5 * temperature**2)


def _deepseek_v3(values: Values) -> Settings:
    return latent_attention(values) | {
        "rope_interleaved": bool(values["rope_interleave"]),
        "mixture": sigmoid_mixture(values),
        "sparse_layers": dense_first(values),
        "further_layers": values["num_nextn_predict_layers"] or 0,
    }


_V2_GROUPS = {"greedy": False, "group_limited_greedy": True}


def _deepseek_v2(values: Values) -> Settings:
    method = values["topk_method"]
    if method not in _V2_GROUPS:
        raise ValueError(f"topk_method {method!r} is not supported; supported: {', '.join(_V2_GROUPS)}")
    groups = _groups(values) if _V2_GROUPS[method] else {}
    return latent_attention(values) | {
        "rope_interleaved": True,
        "mixture": _mixture(values, router="softmax of groups", normalised=False, **groups),
        "sparse_layers": dense_first(values),
    }


LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "qk_head_dim": None,
}
# Of its authors' code: layers in which experts may stand, ranks of expert parallelism, and losses of their training.
NEUTRAL = {"moe_layer_freq": (1,), "ep_size": (1,)}

FAMILIES = {
    "deepseek_v2": Family(
        "DeepSeek V2",
        "DeepseekV2ForCausalLM",
        "latent attention; mixtures of experts beside shared ones, from the best groups",
        defaults={
            **LATENT,
            "q_lora_rank": 1536,
            "n_routed_experts": 64,
            "num_experts_per_tok": None,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
            "first_k_dense_replace": 0,
        },
        settings=_deepseek_v2,
        neutral={**NEUTRAL, "scoring_func": ("softmax",), "norm_topk_prob": (False,)},
        own_code="modeling_deepseek",
        published={"num_experts_per_tok": 6},
    ),
    "deepseek_v3": Family(
        "DeepSeek V3, Moonlight",
        "DeepseekV3ForCausalLM",
        "latent attention; mixtures of experts beside shared ones, chosen by sigmoid and correction bias from the best "
        "groups",
        defaults={
            **LATENT,
            "q_lora_rank": 1536,
            "rope_interleave": True,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
        settings=_deepseek_v3,
        neutral={**NEUTRAL, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        own_code="modeling_deepseek",
    ),
}
