"""bf16 to NF4 and its absmax to 8 bits: bound by memory."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.kernels import context, kernels, peers
from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.peers import Peer
from qsharded import blockwise8, nf4
from qsharded_kernels import cuda_absmax

Encoding = tuple[Tensor, Tensor, Tensor, Tensor]


def cases(run: context.Context, shape: tuple[int, int]) -> Iterator[Case]:
    """One case. The reference in plain PyTorch is among the contenders."""
    packed = context.pack(shape, run.device)
    contenders = [own(name, encode, packed) for name, encode in encoders(run.device).items()]
    contenders += [of_peer(peer, packed.weight) for peer in run.peers]
    yield Case(
        "quantize",
        shape,
        rows=None,
        bytes=packed.bytes + packed.weight.nbytes,
        flops=0,
        expected=packed.decoded(),
        contenders=contenders,
    )


def encoders(device: torch.device) -> dict[str, Callable[[Tensor], Encoding]]:
    """Ours, by name: weight to codes, absmax codes, scales and offset."""
    found = {name: partial(encode_by, module, SECOND_LEVEL[name]) for name, module in kernels.on(device).items()}
    return found | {"reference": lambda weight: by_reference(*nf4.encode(weight))}


def encode_by(module: ModuleType, second_level: Callable[[Tensor, Tensor], Encoding], weight: Tensor) -> Encoding:
    return second_level(*module.quantize(weight, nf4.thresholds(weight.device)))


def by_reference(codes: Tensor, absmax: Tensor) -> Encoding:
    return codes, *nf4.double_quantize(absmax)


def by_cuda(codes: Tensor, absmax: Tensor) -> Encoding:
    return codes, *cuda_absmax.double_quantize(absmax, blockwise8.thresholds(True, absmax.device))


def by_triton(codes: Tensor, absmax: Tensor) -> Encoding:
    """Step by step, as ranks do it; the mean is formed on the host."""
    from qsharded_kernels import triton_absmax

    N, G = absmax.shape
    offset = nf4.absmax_offset(triton_absmax.absmax_row_sums(absmax), G).to(absmax.device)
    scales = triton_absmax.absmax_scales(absmax, offset, first_row=0, rows=N)
    thresholds = blockwise8.thresholds(True, absmax.device)
    return codes, triton_absmax.encode_absmax(absmax, scales, offset, thresholds, first_row=0), scales, offset


SECOND_LEVEL = {"cuda": by_cuda, "triton": by_triton, "compiled": by_reference}


def own(name: str, encode: Callable[[Tensor], Encoding], packed: context.Packed) -> Contender:
    """Held to the reference's bytes: another byte is no answer at all."""

    def result() -> Tensor:
        encoding = encode(packed.weight)
        same = all(torch.equal(mine, theirs) for mine, theirs in zip(encoding, packed.arguments(), strict=True))
        return packed.decoded() if same else torch.full(packed.weight.shape, torch.nan)

    return Contender(name, partial(encode, packed.weight), 0.0, result)


def of_peer(peer: Peer, weight: Tensor) -> Contender:
    def result() -> Tensor:
        return peer.dequantize(peer.quantize(weight))

    return Contender(peer.name, partial(peer.quantize, weight), peers.TOLERANCE, result)
