"""Arguments of another kind than a function takes, told in a sentence in place of an AttributeError deep inside."""

from typing import Any


def refuse_other_kind(value: Any, kind: Any, name: str, words: str) -> None:
    """Raise ValueError unless ``value``, the argument ``name``, is an instance of ``kind``, which ``words`` name."""
    if isinstance(value, kind):
        return
    raise ValueError(f"{name} must be {words}, got {_found(value)}")


def _found(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__} itself: make one of it, {value.__qualname__}(...)"
    found = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return found + (": torch.from_numpy(array) makes a tensor of an array" if found == "numpy.ndarray" else "")
