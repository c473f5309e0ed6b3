"""Commands' options: dataclasses that the command line, TOML files and the documentation are made from."""

from qsharded.config.builtin import builtin_overrides, parse_train
from qsharded.config.options import check_values, option
from qsharded.config.parsing import parse, read_toml, write_toml
from qsharded.config.train import TrainConfig

__all__ = [
    "TrainConfig",
    "builtin_overrides",
    "check_values",
    "option",
    "parse",
    "parse_train",
    "read_toml",
    "write_toml",
]
