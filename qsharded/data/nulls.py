"""Rows without the nulls that Arrow puts into them."""

from typing import Any


def without_nulls(value: Any) -> Any:
    """``value`` less its null fields: Arrow gives each struct every field that any of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
