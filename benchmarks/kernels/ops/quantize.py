"""bf16 to NF4 and its absmax to 8 bits: bound by memory."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import context, peers
from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.peers import Peer
from qsharded.quant import backends, blockwise8, formats
from qsharded.quant.kernels import Kernels

Encoding = tuple[Tensor, Tensor, Tensor, Tensor]


def cases(run: context.Context, shape: tuple[int, int]) -> Iterator[Case]:
    """One case. The reference in plain PyTorch is among the contenders."""
    packed = context.pack(shape, run.device)
    contenders = [own(name, encode, packed) for name, encode in encoders(run.device).items()]
    contenders += [of_peer(peer, packed.weight) for peer in run.peers]
    yield packed.conversion("quantize", contenders)


def encoders(device: torch.device) -> dict[str, Callable[[Tensor], Encoding]]:
    """Ours, by name: weight to codes, absmax codes, scales and offset."""
    found: dict[str, Callable[[Tensor], Encoding]] = {
        name: partial(by_kernels, kernels) for name, kernels in backends.implementations(device).items()
    }
    return found | {"reference": by_reference}


def by_kernels(kernels: Kernels, weight: Tensor) -> Encoding:
    assert kernels.absmax is not None
    codes, absmax = kernels.quantize(weight, formats.NF4_64)
    return codes, *kernels.absmax.double_quantize(absmax, blockwise8.thresholds(True, weight.device))


def by_reference(weight: Tensor) -> Encoding:
    codes, absmax = formats.quantize_blocks(weight)
    return codes, *formats.double_quantize(absmax)


def own(name: str, encode: Callable[[Tensor], Encoding], packed: context.Packed) -> Contender:
    """Held to the reference's bytes: another byte is no answer at all."""

    def result() -> Tensor:
        encoding = encode(packed.weight)
        same = all(torch.equal(mine, theirs) for mine, theirs in zip(encoding, packed.arguments(), strict=True))
        return packed.dequantized() if same else torch.full(packed.weight.shape, torch.nan)

    return Contender(name, partial(encode, packed.weight), 0.0, result)


def of_peer(peer: Peer, weight: Tensor) -> Contender:
    def result() -> Tensor:
        return peer.dequantize(peer.quantize(weight))

    return Contender(peer.name, partial(peer.quantize, weight), peers.TOLERANCE, result)
