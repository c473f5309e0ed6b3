"""JSON knows neither NaN nor infinity, which Python's json writes all the same: here they become null."""

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """``value``, of dicts, lists, strings and numbers, with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value
