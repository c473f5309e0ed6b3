"""What `qsharded.train` runs when it is given no model: the built-in model, its data and settings that suit them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsharded.config.parsing import parse, read_toml
from qsharded.config.train import TrainConfig

_FOLDER = Path(__file__).parent.parent / "builtin"
_PATHS = ("model", "dataset", "eval_dataset", "exact_match_dataset")


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The options of training from its arguments, those of the built-in run where no model is given."""
    return parse(argv, TrainConfig, fill=_not_given)


def _not_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """A plan reads no rows, so it asks for no dataset."""
    return ({"dataset": ""} if given.get("dry_run") else {}) | builtin_overrides(given)


def builtin_note(config: TrainConfig) -> str:
    """A line where other rows than its own are for the built-in model, as --model was perhaps forgotten; or ""."""
    values = builtin_overrides({})
    if config.model != values["model"] or config.datasets == (values["dataset"],):
        return ""
    return "note: without --model the built-in one is trained: of 1.2 million parameters, for trying things out"


def builtin_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the built-in run, by field name, or none when `given` names a model. For `parse`'s `fill`."""
    if "model" in given:
        return {}
    values = read_toml(_FOLDER / "train.toml", TrainConfig)
    if "output_dir" in given:
        values.pop("overwrite_output_dir", None)  # that is said of the built-in run's own folder alone
    return {name: str(_FOLDER / value) if name in _PATHS else value for name, value in values.items()}
