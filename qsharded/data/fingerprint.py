"""Fingerprints of training rows: whether a run that goes on has the rows that it began with, and which are others."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsharded.data.examples import Example
from qsharded.data.facts import facts_of

_RUNS = 256  # hashes kept of a dataset: a difference is narrowed down to one in so many of its rows


@dataclass(frozen=True)
class RowsFingerprint:
    """The training rows in the dataset's order, as ids and loss masks: what a changed template does to them counts too.

    Attributes:
        rows: how many.
        run: rows that a hash covers; the last may cover fewer.
        ids, masks: a hash for each run of rows, of their ids and of which of these are trained on.
        tokenizer: file name -> hash. It does not decide whether rows are the same, it tells why they are not.
        version: 2: a run's hash is of its rows' own hashes, which a cache of rows keeps. 1, of checkpoints that name
            none: it is of all that its rows hold, which have to be read.
    """

    rows: int
    run: int
    ids: list[str]
    masks: list[str]
    tokenizer: Mapping[str, str]
    version: int = 1

    @classmethod
    def of(
        cls, examples: Sequence[Example], files: Sequence[Path], run: int | None = None, version: int = 2
    ) -> "RowsFingerprint":
        """Of ``examples``, made with the tokenizer in ``files``.

        Args:
            examples: in the dataset's order.
            files: the tokenizer's.
            run: rows that a hash covers; by default as many as leave 256 hashes.
            version: of the hashes.
        """
        run = run or -(-len(examples) // _RUNS) or 1
        starts = range(0, len(examples), run)
        if version == 1:
            runs = [examples[start : start + run] for start in starts]
            ids = [_hash([row.ids.astype("<i4").tobytes() for row in rows]) for rows in runs]
            masks = [_hash([np.packbits(row.trained).tobytes() for row in rows]) for rows in runs]
        else:
            facts = facts_of(examples)
            ids, masks = ([_hash([facts[name][at : at + run].tobytes()]) for at in starts] for name in ("ids", "mask"))
        tokenizer = {path.name: _hash([path.read_bytes()]) for path in files}
        return cls(len(examples), run, ids, masks, tokenizer, version)

    @classmethod
    def like(
        cls, examples: Sequence[Example], files: Sequence[Path], before: Mapping[str, Any] | None
    ) -> "RowsFingerprint":
        """Of ``examples``, so that it can be compared with ``before``, which :meth:`to_json` gave, if there is one."""
        if not before:
            return cls.of(examples, files)
        return cls.of(examples, files, before["run"], before.get("version", 1))

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> "RowsFingerprint":
        """What :meth:`to_json` gave."""
        return cls(**read)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    def difference(self, now: "RowsFingerprint") -> str | None:
        """In words, where ``now``, which has runs as long as this, holds other rows; None where it does not."""
        assert (now.run, now.version) == (self.run, self.version)
        counts = [] if self.rows == now.rows else [f"{now.rows:,} rows, there were {self.rows:,}"]
        for name, then, there in (("ids", self.ids, now.ids), ("loss masks", self.masks, now.masks)):
            first = next((n for n, (a, b) in enumerate(zip(then, there, strict=False)) if a != b), None)
            if first is not None:
                return "; ".join([*counts, f"the first whose {name} differ is {self._place(first)}"])
        return f"{counts[0]}; those in both are the same" if counts else None

    def _place(self, number: int) -> str:
        first, last = number * self.run + 1, (number + 1) * self.run
        return f"row {first:,}" if self.run == 1 else f"among rows {first:,} to {last:,}"

    def changed_tokenizer_files(self, now: "RowsFingerprint") -> list[str]:
        """The names of files that are other ones in ``now``, or are in one of the two alone."""
        names = self.tokenizer.keys() | now.tokenizer.keys()
        return sorted(name for name in names if self.tokenizer.get(name) != now.tokenizer.get(name))


def _hash(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
