"""The gate, and then the clock."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.kernels.case import Case, Contender, relative_error
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.timing import Times, in_turns


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        error: against fp64, by norm.
        times: microseconds; None where the gate let it not pass or it could not run.
        problem: why not.
        limit: the microseconds that the traffic or the arithmetic takes at the ceilings' speed.
        speedup: the baseline's median over this one's.
    """

    op: str
    N: int
    K: int
    M: int | None
    contender: str
    error: float | None
    times: Times | None
    problem: str | None
    limit: float
    speedup: float | None

    @property
    def fraction(self) -> float | None:
        """Of the limit's speed."""
        return None if self.times is None else self.limit / self.times.median

    def as_record(self) -> dict[str, Any]:
        return asdict(self) | {"fraction_of_limit": self.fraction}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Row":
        times = record["times"] and Times(**record["times"])
        own = {key: value for key, value in record.items() if key != "fraction_of_limit"}
        return cls(**own | {"times": times})


def measure(case: Case, ceilings: Ceilings, device: torch.device, repeats: int) -> list[Row]:
    """A row for each contender; only those whose answer is right are timed."""
    verdicts = {contender.name: judge(contender, case) for contender in case.contenders}
    right = {c.name: c.run for c in case.contenders if verdicts[c.name][1] is None}
    times = in_turns(right, device, repeats) if right else {}
    limit = ceilings.limit(case.bytes, case.flops)
    baseline = times.get(case.baseline) if case.baseline else None

    def row(name: str, error: float | None, problem: str | None) -> Row:
        own = times.get(name)
        speedup = baseline.median / own.median if baseline and own else None
        return Row(case.op, *case.shape, case.rows, name, error, own, problem, limit, speedup)

    return [row(name, *verdict) for name, verdict in verdicts.items()]


def judge(contender: Contender, case: Case) -> tuple[float | None, str | None]:
    """The answer's error, and what is wrong with it."""
    try:
        error = relative_error(contender.answer(), case.expected)
    except torch.OutOfMemoryError:
        return None, "out of memory"
    if error > contender.tolerance:
        return error, f"wrong: error {error:.2g} against fp64, allowed {contender.tolerance:.2g}"
    return error, None
