"""Rows without the nulls that Arrow puts into them."""

from typing import Any


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` less the null fields of its columns: Arrow gives each struct every field that any of them has.

    Columns that are null stay: one may be an answer that is empty.
    """
    return {column: _without(value) for column, value in row.items()}


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without(item) for item in value]
    return value
