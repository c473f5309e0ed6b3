"""Arguments of another kind than a function takes, told in a sentence in place of an AttributeError deep inside."""

from typing import Any


def refuse_other_kind(value: Any, kind: type | tuple[type, ...], name: str, words: str) -> None:
    """Raise ValueError unless ``value``, the argument ``name``, is of that kind; ``words`` name it."""
    if isinstance(value, kind):
        return
    found = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    hint = ": torch.from_numpy(array) makes a tensor of an array" if found == "numpy.ndarray" else ""
    raise ValueError(f"{name} must be {words}, got {found}{hint}")
