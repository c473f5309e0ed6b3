"""What belongs to an adapter folder that a command is given: its base model, and the tokenizer to use with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsharded.checkpoint.adapter import CONFIG_FILE
from qsharded.checkpoint.source import read_json
from qsharded.config import builtin_overrides


def find_adapter(path: str) -> Path:
    """The folder of an adapter.

    Raises:
        ValueError: there is none; a run's folder is told from the adapter inside it.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        return folder
    inside = folder / "adapter"
    hint = f"; did you mean {inside}?" if (inside / CONFIG_FILE).is_file() else ""
    raise ValueError(f"--adapter {path} is no adapter folder, it has no {CONFIG_FILE}{hint}")


def base_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """``--model`` where it is not given: what the adapter was trained on. For ``parse``'s ``fill``.

    Raises:
        ValueError: no adapter where one is said to be, or one that does not name its base.
    """
    if "model" in given or given.get("adapter") is None:
        return {}
    folder = find_adapter(given["adapter"])
    model, revision = _base_of(folder)
    if not model:
        raise ValueError(f"{folder / CONFIG_FILE} names no base model: give --model")
    return {"model": model, "revision": revision}


def base_or_builtin_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, and without an adapter the built-in model."""
    if "model" in given or given.get("adapter") is not None:
        return base_model(given)
    return {"model": builtin_overrides(given)["model"]}


@contextmanager
def mismatch_explained(model: str, adapter: Path | None) -> Iterator[None]:
    """Add to a ValueError that the adapter was made for another model, where it says so."""
    try:
        yield
    except ValueError as error:
        base = _base_of(adapter)[0] if adapter else None
        if not base or base == model:
            raise
        raise ValueError(f"{error}\n(the adapter was trained on {base}, --model is {model})") from error


def _base_of(adapter: Path) -> tuple[str | None, str | None]:
    read = read_json(adapter / CONFIG_FILE)
    return read.get("base_model_name_or_path"), read.get("revision")


def tokenizer_folder(model: Path, adapter: Path | None) -> Path:
    """The adapter's folder if it has a tokenizer, as that is what it was trained with; else the model's."""
    return adapter if adapter and (adapter / "tokenizer.json").is_file() else model
