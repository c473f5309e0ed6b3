"""Fine-tune language models with 4-bit weights sharded by FSDP2 and LoRA adapters on top.

Importing the package imports no torch: the names below load when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsharded import nf4, nn, parallel
    from qsharded.checkpoint import load_model
    from qsharded.nn import quantize_

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "nf4", "nn", "parallel", "quantize_"]

_SUBMODULES = {"nf4", "nn", "parallel"}
_HOMES = {"load_model": "qsharded.checkpoint", "quantize_": "qsharded.nn"}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
