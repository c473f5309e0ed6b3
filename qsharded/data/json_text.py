"""Values that a dataset keeps as JSON in a column of text, since a column has one type."""

import json
from typing import Any

from qsharded.data.row_limits import parse_row


def from_json(value: Any, what: str) -> Any:
    """``value``, or what it says if it is the text of a list or an object.

    Raises:
        ValueError: it begins as such, but is not JSON, or deeper than a row may be; ``what`` names it.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_row(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is text, but not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
