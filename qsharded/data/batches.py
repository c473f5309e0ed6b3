"""Batches: rows of documents as the tensors that the model takes.

Axes: B rows, S positions of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsharded.data.examples import Example
from qsharded.utils.documents import IGNORE, PADDING, Boundaries

# Rows are padded to a multiple of this: products are fast on such sizes, and few lengths are few CUDA graphs to capture
# (rows of 50 to 500 tokens in batches of 4: 8 lengths where multiples of 8 have 22).
_MULTIPLE = 32


@dataclass(frozen=True)
class Batch:
    """int64 tensors, each [B, S].

    Attributes:
        input_ids: the tokens; ``pad_id`` where there is none.
        targets: what each position is to predict, the document's next token, or -100 where none is trained on.
        positions: the token's place in its document; 0 in padding.
        document_ids: the document's number in its row; -1 in padding. None where no row has more than one: padding
            comes last, so attention that is merely causal hides it, and that needs no mask.
        boundaries: those of ``document_ids``, found here since a GPU would have to be waited for.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    document_ids: Tensor | None
    boundaries: Boundaries | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; from pinned memory without waiting."""
        parts: dict[str, Any] = {field.name: _moved(getattr(self, field.name), device) for field in fields(self)}
        return Batch(**parts)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where a GPU copies it beside its work."""
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        pinned: dict[str, Any] = {name: None if part is None else part.pin_memory() for name, part in parts}
        return Batch(**pinned)


def make_batch(rows: Sequence[Sequence[Example]], *, pad_id: int, max_length: int) -> Batch:
    """A batch of ``rows``, padded to the longest and then to a multiple of 32 or ``max_length``, whichever is less.

    Args:
        rows: the documents of each row, of at most ``max_length`` tokens together. None at all: one row of padding,
            for a rank that has nothing to do while others have.
    """
    rows = rows or [()]
    longest = max(1, *(sum(map(len, row)) for row in rows), 1)
    shape = (len(rows), min(padded(longest), max_length))
    assert longest <= max_length, "checked by the caller"
    fills = {"input_ids": pad_id, "targets": IGNORE, "positions": 0, "document_ids": PADDING}
    arrays_BS = {name: np.full(shape, fill, np.int64) for name, fill in fills.items()}
    for number, row in enumerate(rows):
        _fill_row({name: array_BS[number] for name, array_BS in arrays_BS.items()}, row)
    tensors: dict[str, Any] = {name: torch.from_numpy(array_BS) for name, array_BS in arrays_BS.items()}
    if all(len(row) <= 1 for row in rows):
        return Batch(**tensors | {"document_ids": None})
    return Batch(**tensors, boundaries=Boundaries.of(tensors["document_ids"]))


def padded(longest: int) -> int:
    """How long the rows of a batch become, whose longest has so many tokens."""
    return -(-longest // _MULTIPLE) * _MULTIPLE


def _moved(part: Any, device: torch.device | str) -> Any:
    if part is None:
        return None
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part.to(device)


def _fill_row(arrays_S: dict[str, np.ndarray], row: Sequence[Example]) -> None:
    start = 0
    for number, document in enumerate(row):
        end = start + len(document)
        arrays_S["input_ids"][start:end] = document.ids
        # The last token predicts nothing: what follows is another document.
        arrays_S["targets"][start : end - 1] = np.where(document.trained[1:], document.ids[1:], IGNORE)
        arrays_S["positions"][start:end] = np.arange(len(document))
        arrays_S["document_ids"][start:end] = number
        start = end
