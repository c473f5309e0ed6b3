"""Dates as users and files write them."""

from datetime import date
from typing import Any

DATE_IN_WORDS = "a date such as 2025-01-31"


def is_date(value: Any) -> bool:
    """Whether it is the text of a date in ISO's form."""
    try:
        return bool(date.fromisoformat(value))
    except (TypeError, ValueError):
        return False
