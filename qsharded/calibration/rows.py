"""Calibration rows: full rows of tokens, in equal parts from each of several datasets.

Axes: R rows, S tokens in a row.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.data import Example, Tokenizer, load_examples
from qsharded.data.bad_rows import bad_rows_note
from qsharded.data.shuffling import shuffled
from qsharded.data.vocabulary import refuse_beyond_vocabulary
from qsharded.utils import collectives

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

    def of_rank(self, group: dist.ProcessGroup | None) -> Tensor:
        """This rank's rows, of which each has one at least.

        Raises:
            ValueError: there are fewer rows than ranks.
        """
        count, ranks = self.ids_RS.shape[0], collectives.size(group)
        if count < ranks:
            raise ValueError(f"{count} calibration rows are less than one for each of {ranks} ranks: give more")
        return self.ids_RS[collectives.rank(group) :: ranks]


def read_calibration_rows(
    datasets: Sequence[str], tokenizer: Tokenizer, rows: int, length: int, vocab_size: int, *, skip_bad_rows: int = 0
) -> CalibrationRows:
    """``rows`` rows of ``length`` tokens out of ``datasets``, in any format that trains, with the chat template.

    ``skip_bad_rows``: how many of each dataset may be left out as bad; they are logged.

    Raises:
        ValueError: as ``load_examples``; there are fewer rows than datasets; a dataset with too few tokens for one row,
            or with ids beyond ``vocab_size``.
    """
    how: dict[str, Any] = {"max_length": length * rows, "overlong": "truncate", "skip_bad_rows": skip_bad_rows}
    parts = {name: load_examples(name, tokenizer, **how) for name in datasets}
    for part in parts.values():
        for note in bad_rows_note(part.bad, part.bad_reasons):
            logger.info(note)
    return rows_of_parts({name: part.examples for name, part in parts.items()}, rows, length, vocab_size)


def rows_of_parts(
    examples: Mapping[str, Sequence[Example]], rows: int, length: int, vocab_size: int
) -> CalibrationRows:
    """``rows`` rows of ``length`` tokens, in equal parts from several datasets, each by its name.

    Raises:
        ValueError: there are fewer rows than datasets; a dataset with too few tokens for one, or with ids beyond
            ``vocab_size``.
    """
    if rows < len(examples):
        raise ValueError(f"{rows} calibration rows are less than one for each of {len(examples)} datasets: give more")
    shares = zip(examples.items(), _shares(rows, len(examples)), strict=True)
    parts = {name: rows_of(part, count, length, name) for (name, part), count in shares}
    ids_RS = torch.cat(list(parts.values()))
    refuse_beyond_vocabulary(int(ids_RS.max()), vocab_size)
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
