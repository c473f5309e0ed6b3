"""Llama, and families that differ from it in biases, an activation, multipliers or layers without rotary embedding."""

from qsharded.models import layer_patterns
from qsharded.models.families.family import Family, Settings, Values, biases, rope_parameters
from qsharded.models.rope import RopeConfig


def _llama(values: Values) -> Settings:
    return biases(values)


def _granite(values: Values) -> Settings:
    return biases(values) | {
        "attention_scale": values["attention_multiplier"],
        "embedding_multiplier": values["embedding_multiplier"],
        "residual_multiplier": values["residual_multiplier"],
        "logit_multiplier": 1 / values["logits_scaling"],
    }


def _has_rope(values: Values) -> list[bool]:
    """SmolLM3's: ``no_rope_layers`` has a 1 for a layer *with* rotary embedding."""
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    said = values["no_rope_layers"] or [(layer + 1) % interval for layer in range(layers)]
    if len(said) < layers:
        raise ValueError(f"no_rope_layers has {len(said)} entries for {layers} layers")
    return [bool(said[layer]) for layer in range(layers)]


def _smollm3(values: Values) -> Settings:
    slides = values["use_sliding_window"] and values["sliding_window"] is not None
    types = [layer_patterns.SLIDING if slides and not has else layer_patterns.FULL for has in _has_rope(values)]
    return biases(values) | {"layer_windows": layer_patterns.by_types(values, types)}


def _smollm3_ropes(values: Values) -> Settings:
    rope = RopeConfig.of(rope_parameters(values), {**values, "rope_theta": values.get("rope_theta") or 2e6})
    return {"rope": rope, "layer_ropes": tuple(rope if has else None for has in _has_rope(values))}


def _seed_oss(values: Values) -> Settings:
    return biases(values) | {"o_bias": bool(values["attention_out_bias"])}


def _arcee(values: Values) -> Settings:
    return biases(values) | {"mlp": "ungated", "activation": "relu2"}


FAMILIES = {
    "llama": Family(
        "Llama 2 and 3, SmolLM2, Falcon 3",
        "LlamaForCausalLM",
        defaults={"attention_bias": False, "mlp_bias": False},
        settings=_llama,
    ),
    "granite": Family(
        "Granite 3",
        "GraniteForCausalLM",
        "multipliers of embedding, residual stream, scores and logits",
        defaults={
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        settings=_granite,
        published={"residual_multiplier": 0.22},
    ),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "every fourth layer without rotary embedding",
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        settings=_smollm3,
        ropes=_smollm3_ropes,
        neutral={"max_window_layers": (0, 28, 36)},
    ),
    "seed_oss": Family(
        "Seed-OSS",
        "SeedOssForCausalLM",
        "biases of q, k and v",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
        },
        settings=_seed_oss,
        dropouts=("attention_dropout", "residual_dropout"),
    ),
    "arcee": Family(
        "Arcee AFM",
        "ArceeForCausalLM",
        "MLP of relu^2 without a gate; yarn",
        defaults={"rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
        settings=_arcee,
        neutral={"hidden_act": ("relu2",)},
    ),
}
