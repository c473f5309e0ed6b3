"""The gradient dy W with W in NF4, as backward has it, against the same in bf16."""

from collections.abc import Iterator
from functools import partial

import torch

import qsharded.quant.ops  # noqa: F401 - registers torch.ops.qsharded
from benchmarks.kernels import context
from benchmarks.kernels.case import Case, Contender

ROWS = (2048, 4096, 8192)
SHORT_ROWS = (64,)
TOLERANCE = 5e-3  # the weight and the output are rounded to bf16 once each
BASELINE = "bf16"


def cases(run: context.Context, shape: tuple[int, int]) -> Iterator[Case]:
    """A case for each number of rows."""
    packed = context.pack(shape, run.device)
    dequantized = packed.dequantized()
    bf16_weight = dequantized.bfloat16()
    for M in run.rows_of(ROWS, SHORT_ROWS):
        grad = torch.randn(M, shape[0], device=run.device).bfloat16()
        ours = partial(torch.ops.qsharded.nf4_linear_input_grad, grad, *packed.arguments())
        contenders = [
            Contender("qsharded", ours, TOLERANCE),
            Contender(BASELINE, partial(torch.matmul, grad, bf16_weight), TOLERANCE),
        ]
        yield packed.product("input_grad", grad.double() @ dequantized, contenders, BASELINE)
