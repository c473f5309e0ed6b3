"""NF4 with double quantization to bf16: bound by memory."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels import context, peers
from benchmarks.kernels.case import Case, Contender
from qsharded.quant import backends

# bf16 keeps 8 bits: rounding errs by 2^-9 at most, by 1e-3 of the norm over many
TOLERANCE = 2e-3


def cases(run: context.Context, shape: tuple[int, int]) -> Iterator[Case]:
    """One case. The reference in plain PyTorch is among the contenders."""
    packed = context.pack(shape, run.device)
    own = {
        name: partial(kernels.dequantize, packed.packed(), torch.bfloat16, None)
        for name, kernels in backends.implementations(run.device).items()
    }
    own["reference"] = partial(backends.dequantize_by_reference, packed.packed(), torch.bfloat16)
    contenders = [Contender(name, function, TOLERANCE) for name, function in own.items()]
    for peer in run.peers:
        dequantize = partial(peer.dequantize, peer.quantize(packed.weight))
        contenders.append(Contender(peer.name, dequantize, peers.TOLERANCE))
    yield packed.conversion("dequantize", contenders)
