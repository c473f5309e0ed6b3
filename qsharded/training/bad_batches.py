"""The documents of steps whose gradient was not finite, written down with the rows that they were made of."""

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qsharded.checkpoint.files import write_json
from qsharded.config import TrainConfig
from qsharded.data import Batch, Step, Tokenizer
from qsharded.data.origins import find_origins
from qsharded.utils.durable_files import NotWritten

FOLDER = "not-finite"
_REMEMBERED = 3  # steps: figures are read one late
_MOST_FILES = 20  # of a rank: a run that has diverged has as many such steps as it is allowed
_SHOWN = 2000  # characters of a document
_SEARCH_S = 60.0


@dataclass(frozen=True)
class _Remembered:
    number: int
    micro_batches: Sequence[Batch]
    loss: Tensor


class BadBatches:
    """Remembers this rank's last steps, and writes down the bad ones: ``not-finite/step-N-rank-R.json``."""

    def __init__(self, config: TrainConfig, rank: int, tokenizer: Tokenizer) -> None:
        self._config, self._rank, self._tokenizer = config, rank, tokenizer
        self._steps: deque[_Remembered] = deque(maxlen=_REMEMBERED)
        self._written = 0

    def remember(self, number: int, step: Step, loss: Tensor) -> None:
        """Step ``number``, whose sum of losses on this rank is ``loss``, which may not be computed yet."""
        self._steps.append(_Remembered(number, step.micro_batches, loss))

    def write(self, number: int) -> Path | None:
        """Write the documents of step ``number`` and where they come from; the file, or None where none is written."""
        step = next((step for step in self._steps if step.number == number), None)
        if step is None or self._written >= _MOST_FILES:
            return None
        self._written += 1
        path = Path(self._config.output_dir, FOLDER, f"step-{number:06d}-rank-{self._rank:05d}.json")
        path.parent.mkdir(exist_ok=True)
        loss = step.loss.item()
        found = {"step": number, "rank": self._rank, "loss": loss if math.isfinite(loss) else str(loss)}
        try:
            write_json(path, found | {"documents": self._documents(step)})
        except NotWritten:
            return None  # the step is skipped all the same
        return path

    def _documents(self, step: _Remembered) -> list[dict[str, Any]]:
        documents = [ids for batch in step.micro_batches for ids in _ids(batch)]
        texts = [self._tokenizer.decode(ids) for ids in documents]
        rows = self._origins([self._tokenizer.decode(ids, skip_special_tokens=True) for ids in documents])
        return [
            {"rows": origins, "tokens": len(ids), "text": text[:_SHOWN]}
            for ids, text, origins in zip(documents, texts, rows, strict=True)
        ]

    def _origins(self, texts: Sequence[str]) -> list[list[str]]:
        sources = [(dataset, self._config.dataset_split) for dataset in self._config.datasets]
        try:
            return find_origins(texts, sources, _SEARCH_S)
        except ValueError:
            return [[] for _ in texts]  # the dataset is no longer there


def _ids(batch: Batch) -> Iterator[list[int]]:
    """Of each document in it, without padding, which comes last in a row and has position 0."""
    for row, ids_S in enumerate(batch.input_ids):
        if batch.document_ids is None:
            yield ids_S[: int(batch.positions[row].max()) + 1].tolist()
        else:
            documents_S = batch.document_ids[row]
            yield from (ids_S[documents_S == number].tolist() for number in range(int(documents_S.max()) + 1))


def rows_of(output_dir: Path) -> list[str]:
    """``file:line`` of the rows in the files there of ranks whose own loss was not finite, or else of all."""
    read = [json.loads(path.read_text()) for path in sorted((output_dir / FOLDER).glob("step-*.json"))]
    guilty = [one for one in read if isinstance(one["loss"], str)] or read
    rows = (row for one in guilty for document in one["documents"] for row in document["rows"][:1])
    return list(dict.fromkeys(rows))
