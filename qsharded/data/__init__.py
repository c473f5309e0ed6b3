"""From rows to batches: rows -> shapes -> chat template -> ids and loss mask -> packed rows -> steps, resumable."""

from qsharded.data.batches import Batch, make_batch
from qsharded.data.examples import Dataset, Example, split_examples
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
