"""What `qsharded.train` runs when it is given no model: the built-in model, its data and settings that suit them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsharded.config.parsing import read_toml
from qsharded.config.train import TrainConfig

_FOLDER = Path(__file__).parent.parent / "builtin"
_PATHS = ("model", "dataset", "eval_dataset", "exact_match_dataset")


def builtin_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the built-in run, by field name, or none when `given` names a model. For `parse`'s `fill`."""
    if "model" in given:
        return {}
    values = read_toml(_FOLDER / "train.toml", TrainConfig)
    if "output_dir" in given:
        values.pop("overwrite_output_dir", None)  # that is said of the built-in run's own folder alone
    return {name: str(_FOLDER / value) if name in _PATHS else value for name, value in values.items()}
