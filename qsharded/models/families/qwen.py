"""Qwen2 to Qwen3.5."""

from typing import Any

from qsharded.models import layer_patterns
from qsharded.models.families.family import Family, Settings, Values, biases, mixture, rope_parameters
from qsharded.models.layer_shapes import ExpertMixture, LinearAttention
from qsharded.models.rope import RopeConfig


def _qwen2(values: Values) -> Settings:
    return {"qkv_bias": True, "layer_windows": layer_patterns.last_layers(values)}


def _qwen3(values: Values) -> Settings:
    return biases(values) | {"qk_norm": True, "layer_windows": layer_patterns.last_layers(values)}


def _sparse_layers(values: Values) -> tuple[bool, ...]:
    """Every ``decoder_sparse_step``-th layer, less those that are named."""
    step, dense = values["decoder_sparse_step"] or 1, values["mlp_only_layers"] or []
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(values["num_hidden_layers"]))


def _qwen3_moe(values: Values) -> Settings:
    normalised = bool(values["norm_topk_prob"])
    windows = layer_patterns.everywhere(values) if values["use_sliding_window"] else ()
    return biases(values) | {
        "qk_norm": True,
        "mixture": mixture(values, experts="num_experts", size="moe_intermediate_size", normalised=normalised),
        "sparse_layers": _sparse_layers(values),
        "layer_windows": windows,
    }


def _linear_types(values: Values) -> list[str]:
    interval, layers = values["full_attention_interval"], values["num_hidden_layers"]
    otherwise = [_LINEAR if (layer + 1) % interval else layer_patterns.FULL for layer in range(layers)]
    types = layer_patterns.types(values, otherwise)
    for unknown in sorted(set(types) - {_LINEAR, layer_patterns.FULL}):
        raise ValueError(f"layer_types: {unknown!r} is not supported ({_LINEAR} and {layer_patterns.FULL} are)")
    return types


def _qwen3_5(values: Values, *, fused: bool = False) -> Settings:
    linear = LinearAttention(
        fused=fused,
        key_heads=values["linear_num_key_heads"],
        value_heads=values["linear_num_value_heads"],
        key_dim=values["linear_key_head_dim"],
        value_dim=values["linear_value_head_dim"],
        taps=values["linear_conv_kernel_dim"],
    )
    return biases(values) | {
        "qk_norm": True,
        "norm_offset": True,
        "attention_gate": True,
        "linear": linear,
        "linear_layers": tuple(kind == _LINEAR for kind in _linear_types(values)),
    }


def _beside_a_shared_one(values: Values, **settings: Any) -> ExpertMixture:
    """The experts of Qwen3-Next and Qwen3.5, with one more that a gate weighs."""
    return mixture(
        values,
        experts="num_experts",
        size="moe_intermediate_size",
        shared_size=values["shared_expert_intermediate_size"] or 0,
        shared_name="shared_expert",
        shared_gate=True,
        **settings,
    )


def _qwen3_5_moe(values: Values) -> Settings:
    return _qwen3_5(values) | {"mixture": _beside_a_shared_one(values)}


def _qwen3_next(values: Values) -> Settings:
    experts = _beside_a_shared_one(values, normalised=bool(values["norm_topk_prob"]))
    return _qwen3_5(values, fused=True) | {"mixture": experts, "sparse_layers": _sparse_layers(values)}


def _qwen3_5_rope(values: Values) -> Settings:
    """The three positions of a text's token are one, so that what mixes them changes nothing."""
    given = rope_parameters(values)
    return {"rope": RopeConfig.of({key: given[key] for key in given if not key.startswith("mrope_")}, values)}


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_LINEAR = "linear_attention"
_QWEN3_5 = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
    # of layers that predict further tokens, which are not trained
    "mtp_num_hidden_layers": None,
    "mtp_use_dedicated_embeddings": None,
}
_MIXTURE = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_NEUTRAL_3_5 = {"attn_output_gate": (True,), "mamba_ssm_dtype": ("float32",)}


FAMILIES = {
    "qwen2": Family(
        "Qwen2 and 2.5",
        "Qwen2ForCausalLM",
        "biases of q, k and v; sliding windows in some layers",
        defaults={"num_key_value_heads": 32, **_QWEN_WINDOWS},
        settings=_qwen2,
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        "q and k normalised; sliding windows in some layers",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_QWEN_WINDOWS},
        settings=_qwen3,
    ),
    "qwen3_moe": Family(
        "Qwen3 MoE",
        "Qwen3MoeForCausalLM",
        "mixtures of experts; q and k normalised",
        defaults={
            "num_key_value_heads": 4,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": None,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        settings=_qwen3_moe,
    ),
    "qwen3_5_text": Family(
        "Qwen3.5 (dense)",
        "Qwen3_5ForCausalLM",
        "gated delta-net layers beside gated attention; a quarter of each head is rotated; norms of 1 + weight",
        defaults={
            "vocab_size": 248_320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            **_QWEN3_5,
        },
        settings=_qwen3_5,
        ropes=_qwen3_5_rope,
        neutral={"mlp_only_layers": ([],), **_NEUTRAL_3_5},
        partial_rotary=True,
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3.5 MoE",
        "Qwen3_5MoeForCausalLM",
        "as Qwen3.5, with mixtures of experts beside a shared one that a gate weighs",
        defaults={
            "vocab_size": 248_320,
            "num_hidden_layers": 40,
            "intermediate_size": 512,  # of no layer
            "num_experts": 256,
            "num_experts_per_tok": 8,
            **_MIXTURE,
            **_QWEN3_5,
        },
        settings=_qwen3_5_moe,
        ropes=_qwen3_5_rope,
        neutral={"mlp_only_layers": ([],), **_NEUTRAL_3_5},
        partial_rotary=True,
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "as Qwen3.5 MoE, with other projections in its gated delta-net layers",
        defaults={
            "vocab_size": 151_936,
            "num_hidden_layers": 48,
            "intermediate_size": 5632,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            **_MIXTURE,
            **_QWEN3_5,
        },
        settings=_qwen3_next,
        ropes=_qwen3_5_rope,
        neutral=_NEUTRAL_3_5,
        partial_rotary=True,
    ),
}
