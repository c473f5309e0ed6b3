"""How the weights of a packed checkpoint were rounded: a file beside them, which no loader needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qsharded.checkpoint.files import write_json
from qsharded.utils.untrusted_json import check, integer, map_of, number, read_json, require, text

CALIBRATION_FILE = "qsharded_calibration.json"
NEAREST = "nearest"
"""The rounding of weights that nothing was calibrated for."""
_COUNT = integer(1, 1 << 48)
_SCHEMA = {
    "method": text(64),
    "rows": _COUNT,
    "length": _COUNT,
    "sources": map_of(_COUNT, 1 << 12),
    "data": text(64),
    "damping": map_of(number(0, 1e3, or_equal=True), 8),
    "quant_format": text(64),
}
_EXPERTS = {"experts": map_of(integer(0, 1 << 48), 8)}  # older files lack it: there experts are rounded to nearest
ALL_EXPERTS, BY_SEARCH = "all", " by search"


@dataclass(frozen=True)
class CalibrationRecord:
    """What decided the rounding.

    Attributes:
        method: "compensated" or "search".
        rows, length: of the calibration, and tokens in one.
        sources: how many of the rows are from each dataset.
        data: a hash of the rows' ids.
        damping: parts of the diagonal of the inputs' second moments that were added to it, by what they are part of.
        quant_format: in words.
        experts: of a mixture how many there are, "all", and of how many "gate and up by search" and "down by search",
            which chooses scales alone.
    """

    method: str
    rows: int
    length: int
    sources: Mapping[str, int]
    data: str
    damping: Mapping[str, float]
    quant_format: str
    experts: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Have the packed checkpoint in ``folder`` say it."""
        write_json(folder / CALIBRATION_FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> "CalibrationRecord | None":
        """What the checkpoint in ``folder`` says; None where its weights were rounded to nearest.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        read = read_json(path)
        require(read, _SCHEMA, str(path))
        check(read, _EXPERTS, str(path))
        return cls(**{key: read[key] for key in _SCHEMA}, experts=read.get("experts", {}))

    @property
    def rounding(self) -> str:
        """A short name, the same for the same rounding of the same weights."""
        return f"{self.method} {self.data}" + (" with experts" if self.experts else "")

    def __str__(self) -> str:
        shares = ", ".join(f"{count} of {name}" for name, count in self.sources.items())
        return f"{self.method}, on {self.rows} rows of {self.length:,} tokens ({shares}){self._of_experts()}"

    def _of_experts(self) -> str:
        by_search = {what: count for what, count in self.experts.items() if what != ALL_EXPERTS and count}
        if not by_search or self.method == "search":
            return ""
        counts = ", ".join(f"{what} for {count:,}" for what, count in by_search.items())
        return f"; {counts} of {self.experts[ALL_EXPERTS]:,} experts, which got too few tokens"
