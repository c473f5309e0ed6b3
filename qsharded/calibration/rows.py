"""Calibration rows: full rows of tokens, in equal parts from each of several datasets.

Axes: R rows, S tokens in a row.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from qsharded.data import Example, Tokenizer, load_examples
from qsharded.data.shuffling import shuffled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationRows:
    """What a model is calibrated on.

    Attributes:
        ids_RS: int64.
        sources: how many rows are from each dataset, by its name.
    """

    ids_RS: Tensor
    sources: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """A hash of the ids."""
        return hashlib.sha256(self.ids_RS.contiguous().numpy().tobytes()).hexdigest()[:16]


def read_calibration_rows(
    datasets: Sequence[str], tokenizer: Tokenizer, rows: int, length: int, vocab_size: int
) -> CalibrationRows:
    """``rows`` rows of ``length`` tokens out of ``datasets``, in any format that trains, with the chat template.

    Raises:
        ValueError: as ``load_examples``; there are fewer rows than datasets; a dataset with too few tokens for one row,
            or with ids beyond ``vocab_size``.
    """
    if rows < len(datasets):
        raise ValueError(f"--calibrate-rows {rows} is less than a row for each of the {len(datasets)} datasets")
    parts = {}
    for name, count in zip(datasets, _shares(rows, len(datasets)), strict=True):
        examples = load_examples(name, tokenizer, max_length=length * count, overlong="truncate").examples
        parts[name] = rows_of(examples, count, length, name)
    return together(parts, vocab_size)


def together(parts: Mapping[str, Tensor], vocab_size: int) -> CalibrationRows:
    """The rows of several datasets as one.

    Raises:
        ValueError: an id beyond ``vocab_size``.
    """
    ids_RS = torch.cat(list(parts.values()))
    if (largest := int(ids_RS.max())) >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocab_size is {vocab_size}: the tokenizer's files and "
            "config.json are of different models"
        )
    return CalibrationRows(ids_RS, {name: part.shape[0] for name, part in parts.items()})


def _shares(rows: int, parts: int) -> list[int]:
    """Whole numbers as equal as can be, the larger ones first."""
    return [rows // parts + (part < rows % parts) for part in range(parts)]


def rows_of(examples: Sequence[Example], rows: int, length: int, name: str) -> Tensor:
    """int64 [R, S]: examples from the whole of a dataset, one behind the other, cut into full rows.

    There are fewer than ``rows`` where the examples do not fill them, which is logged.

    Raises:
        ValueError: they do not fill one.
    """
    taken: list[np.ndarray] = []
    left = rows * length
    for number in shuffled(len(examples), Random(f"calibration {len(examples)}")):
        if left <= 0:
            break
        taken.append(examples[number].ids)
        left -= len(taken[-1])
    ids = np.concatenate(taken)[: rows * length].astype(np.int64)
    found = len(ids) // length
    if not found:
        raise ValueError(f"{name} has {len(ids):,} tokens, too few for a calibration row of {length}: give more rows")
    if found < rows:
        logger.warning("%s fills %d calibration rows of %d tokens, not %d", name, found, length, rows)
    return torch.from_numpy(ids[: found * length]).view(found, length)
