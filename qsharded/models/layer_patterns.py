"""Which layers have a sliding window and which rotary embedding: the spellings of config.json.

transformers 5 names each layer in ``layer_types``; older files count layers or give a pattern.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qsharded.models.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"

Values = Mapping[str, Any]
Windows = tuple[int | None, ...]


def everywhere(values: Values) -> Windows:
    """One window for all layers, or none."""
    return (values["sliding_window"],) * values["num_hidden_layers"]


def last_layers(values: Values) -> Windows:
    """Qwen's: with ``use_sliding_window`` the layers from ``max_window_layers`` on."""
    layers = values["num_hidden_layers"]
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = min(values["max_window_layers"], layers) if window else layers
    return by_types({**values, "sliding_window": window}, [FULL] * first + [SLIDING] * (layers - first))


def every(period: int, values: Values) -> list[str]:
    """All layers slide but each ``period``-th; with a period of 0, all.

    Raises:
        ValueError: the period is none, but a pattern of letters, which few families have.
    """
    if not isinstance(period, int):
        raise ValueError(f"sliding_window_pattern must be a number of layers in this family, got {period!r}")
    return [SLIDING if not period or (layer + 1) % period else FULL for layer in range(values["num_hidden_layers"])]


def types(values: Values, otherwise: Sequence[str]) -> list[str]:
    """Each layer's type: ``layer_types``, or without it the family's pattern."""
    return list(values["layer_types"] or otherwise or [FULL] * values["num_hidden_layers"])


def by_types(values: Values, otherwise: Sequence[str]) -> Windows:
    """Each layer's window by its type.

    Raises:
        ValueError: a type that is not known, or a sliding layer without a window.
    """
    return tuple(_window_of(layer_type, values["sliding_window"]) for layer_type in types(values, otherwise))


def _window_of(layer_type: str, window: int | None) -> int | None:
    if layer_type == FULL:
        return None
    if layer_type != SLIDING:
        raise ValueError(f"layer_types: {layer_type!r} is not supported ({FULL} and {SLIDING} are)")
    if window is None:
        raise ValueError(f"layer_types has {SLIDING}, but use_sliding_window is false or sliding_window null")
    return window


def ropes_by_type(values: Values, types: Sequence[str], full: Values, sliding: Values) -> dict[str, Any]:
    """``rope`` (that of layers that see all) and ``layer_ropes`` of a family whose sliding layers have their own.

    transformers 5 nests ``rope_parameters`` by layer type; 4's ``rope_theta`` and ``rope_scaling`` are of full layers.

    Args:
        full, sliding: defaults of each type's parameters.
    """
    nested = values.get("rope_parameters") or {}
    unknown = sorted(nested.keys() - {FULL, SLIDING})
    if unknown:
        raise ValueError(f"rope_parameters: {unknown[0]!r} is no layer type ({FULL} and {SLIDING} are)")
    old = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
    ropes = {
        FULL: RopeConfig.of({**full, **_given(old), **_given(nested.get(FULL))}, values),
        SLIDING: RopeConfig.of({**sliding, **_given(nested.get(SLIDING))}, values),
    }
    for layer_type in types:
        _window_of(layer_type, 1)
    return {"rope": ropes[FULL], "layer_ropes": tuple(ropes[layer_type] for layer_type in types)}


def _given(parameters: Values | None) -> Values:
    return {key: value for key, value in (parameters or {}).items() if value is not None}
