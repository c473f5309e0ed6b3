"""One thing to measure: an operation on one shape, and those who can do it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Contender:
    """Someone who can do an operation.

    Attributes:
        name: shown in the table.
        run: what is timed.
        tolerance: the largest ``relative_error`` of an answer.
        result: the answer that the gate looks at; None takes what ``run`` returns.
    """

    name: str
    run: Callable[[], object]
    tolerance: float
    result: Callable[[], Tensor] | None = None

    def answer(self) -> Tensor:
        value = self.result() if self.result is not None else self.run()
        assert isinstance(value, Tensor), (self.name, type(value))
        return value


@dataclass(frozen=True)
class Case:
    """An operation on one shape.

    Attributes:
        op: the operation's name.
        shape: N, K of the weight.
        rows: M of the activations; None for what has none.
        bytes: read and written at the least, each once.
        flops: floating-point operations of the matrix units.
        expected: the fp64 answer.
        contenders: by this machine's kernels, the baseline and the peers.
        baseline: the contender that speed-up is counted against; None where there is none.
    """

    op: str
    shape: tuple[int, int]
    rows: int | None
    bytes: int
    flops: int
    expected: Tensor
    contenders: list[Contender]
    baseline: str | None = None

    @property
    def label(self) -> str:
        N, K = self.shape
        return f"{self.op} {N}x{K}" + ("" if self.rows is None else f" M={self.rows}")


def relative_error(answer: Tensor, expected: Tensor) -> float:
    """norm(answer - expected) / norm(expected) in fp64; infinite where shapes differ or a value is NaN."""
    if answer.shape != expected.shape:
        return float("inf")
    error = ((answer.double() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
