"""y = x W^T with W in NF4, against the same in bf16: bound by memory at few rows, by the matrix units at many."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels import context, peers
from benchmarks.kernels.case import Case, Contender
from qsharded.quant import ops

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192)
SHORT_ROWS = (1, 16)
# The weight and the output are rounded to bf16 once each.
TOLERANCE = 5e-3
BASELINE = "bf16"


def cases(run: context.Context, shape: tuple[int, int]) -> Iterator[Case]:
    """A case for each number of rows."""
    packed = context.pack(shape, run.device)
    dequantized = packed.dequantized()
    bf16_weight = dequantized.bfloat16()  # the gate holds everyone to one weight
    theirs = [(peer, peer.quantize(packed.weight)) for peer in run.peers]
    for M in run.rows_of(ROWS, SHORT_ROWS):
        x = torch.randn(M, shape[1], device=run.device).bfloat16()
        contenders = [
            Contender("qsharded", partial(ops.nf4_linear, x, packed.packed()), TOLERANCE),
            Contender(BASELINE, partial(F.linear, x, bf16_weight), TOLERANCE),
            *(Contender(peer.name, partial(peer.linear, x, weight), peers.TOLERANCE) for peer, weight in theirs),
        ]
        yield packed.product("linear", x.double() @ dequantized.T, contenders, BASELINE)
