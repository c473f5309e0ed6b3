"""OLMo 2 and 3."""

from qsharded.models import layer_patterns
from qsharded.models.config import POST_NORMS
from qsharded.models.families.family import Family, Settings, Values, biases


def _olmo2(values: Values) -> Settings:
    return biases(values) | {"norms": POST_NORMS, "qk_norm": True, "qk_norm_place": "width"}


def _olmo3_types(values: Values) -> list[str]:
    return layer_patterns.types(values, layer_patterns.every(4, values))


def _olmo3(values: Values) -> Settings:
    return _olmo2(values) | {"layer_windows": layer_patterns.by_types(values, _olmo3_types(values))}


def _olmo3_ropes(values: Values) -> Settings:
    theta = {"rope_theta": values.get("rope_theta") or 500_000.0}
    return layer_patterns.ropes_by_type(values, _olmo3_types(values), full=theta, sliding=theta)


_OLMO_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}


FAMILIES = {
    "olmo2": Family(
        "OLMo 2",
        "Olmo2ForCausalLM",
        "norms after attention and MLP; q and k normalised over all heads",
        defaults=_OLMO_DEFAULTS,
        settings=_olmo2,
    ),
    "olmo3": Family(
        "OLMo 3",
        "Olmo3ForCausalLM",
        "as OLMo 2; three of four layers have a sliding window and a rotary embedding of their own",
        defaults={**_OLMO_DEFAULTS, "sliding_window": 4096, "layer_types": None},
        settings=_olmo3,
        ropes=_olmo3_ropes,
    ),
}
