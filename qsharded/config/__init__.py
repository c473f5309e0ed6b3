"""Commands' options: dataclasses that the command line, TOML files and the documentation are made from."""

from qsharded.config.builtin import builtin_overrides
from qsharded.config.options import check_values, option
from qsharded.config.parsing import parse, read_toml, write_toml
from qsharded.config.train import TrainConfig

__all__ = ["TrainConfig", "builtin_overrides", "check_values", "option", "parse", "read_toml", "write_toml"]
