"""From rows to batches: rows -> shapes -> chat template -> ids and loss mask -> packed rows -> steps, resumable.

The names below load when they are first used, for processes that only tokenize need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsharded.data.batches import Batch, make_batch
    from qsharded.data.examples import Dataset, Example
    from qsharded.data.held_out import split_examples
    from qsharded.data.load import load_examples
    from qsharded.data.loader import Cursor, Step, StepLoader
    from qsharded.data.mixture import Mixture
    from qsharded.data.prompts import Prompt, load_prompts
    from qsharded.data.records import read_rows
    from qsharded.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Cursor",
    "Dataset",
    "Example",
    "Mixture",
    "Prompt",
    "Step",
    "StepLoader",
    "Tokenizer",
    "load_examples",
    "load_prompts",
    "make_batch",
    "read_rows",
    "split_examples",
]

_NAMES_IN = {
    "batches": ("Batch", "make_batch"),
    "examples": ("Dataset", "Example"),
    "held_out": ("split_examples",),
    "load": ("load_examples",),
    "loader": ("Cursor", "Step", "StepLoader"),
    "mixture": ("Mixture",),
    "prompts": ("Prompt", "load_prompts"),
    "records": ("read_rows",),
    "tokenizer": ("Tokenizer",),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
