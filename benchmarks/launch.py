"""How benchmarks start this project's commands."""

import sys
from collections.abc import Mapping
from typing import Any


def torchrun(ranks: int, module: str, flags: list[str]) -> list[str]:
    """The command line of a module on so many ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", module, *flags]


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """Options by field name as flags; True is a flag without a value."""
    valued = [f"--{key}={value}" for key, value in options.items() if value is not True]
    return valued + [f"--{key}" for key, value in options.items() if value is True]
