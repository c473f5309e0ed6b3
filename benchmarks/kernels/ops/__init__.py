"""The operations that can be measured. Each has ``cases(context, shape)``."""

from collections.abc import Callable, Iterator

from benchmarks.kernels.case import Case
from benchmarks.kernels.context import Context
from benchmarks.kernels.ops import dequantize, input_grad, linear, quantize

OPERATIONS: dict[str, Callable[[Context, tuple[int, int]], Iterator[Case]]] = {
    "dequantize": dequantize.cases,
    "quantize": quantize.cases,
    "linear": linear.cases,
    "input_grad": input_grad.cases,
}
