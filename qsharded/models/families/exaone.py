"""EXAONE 4."""

from qsharded.models import layer_patterns
from qsharded.models.config import POST_NORMS
from qsharded.models.families.family import Family, Settings, Values
from qsharded.models.rope import RopeConfig


def _exaone4_types(values: Values) -> list[str]:
    pattern, layers = values["sliding_window_pattern"], values["num_hidden_layers"]
    if values["sliding_window"] is None or not pattern:
        return layer_patterns.types(values, [layer_patterns.FULL] * layers)
    if isinstance(pattern, str):  # "LLLG"; the last layer sees all in any case
        slides = [pattern[layer % len(pattern)] == "L" for layer in range(layers - 1)] + [False]
        otherwise = [layer_patterns.SLIDING if is_sliding else layer_patterns.FULL for is_sliding in slides]
        return layer_patterns.types(values, otherwise)
    return layer_patterns.types(values, layer_patterns.every(pattern, values))


def _exaone4(values: Values) -> Settings:
    windows = layer_patterns.by_types(values, _exaone4_types(values))
    return {"norms": POST_NORMS, "qk_norm": True, "layer_windows": windows}


def _exaone4_ropes(values: Values) -> Settings:
    """In a model with windows the layers that see all have no rotary embedding."""
    rope, is_hybrid = RopeConfig.from_hf(values), values["sliding_window"] is not None
    types = _exaone4_types(values)
    return {
        "rope": rope,
        "layer_ropes": tuple(None if is_hybrid and kind == layer_patterns.FULL else rope for kind in types),
    }


FAMILIES = {
    "exaone4": Family(
        "EXAONE 4",
        "Exaone4ForCausalLM",
        "norms after attention and MLP; q and k normalised; three of four layers have a sliding window, the others no "
        "rotary embedding",
        defaults={
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        settings=_exaone4,
        ropes=_exaone4_ropes,
    ),
}
