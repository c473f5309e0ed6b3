"""What every operation's cases are made from: the device, the peers, and packed weights."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.peers import Peer
from qsharded.quant import formats
from qsharded.quant.packed_weight import PackedWeight


@dataclass(frozen=True)
class Context:
    """``rows``: the M of the activations to measure; None takes each operation's own."""

    device: torch.device
    peers: tuple[Peer, ...]
    short: bool
    rows: tuple[int, ...] | None = None

    def rows_of(self, full: tuple[int, ...], short: tuple[int, ...]) -> tuple[int, ...]:
        return self.rows or (short if self.short else full)


@dataclass(frozen=True)
class Packed:
    """A weight in bf16 and in NF4 with double quantization."""

    weight: Tensor
    codes: Tensor
    absmax: Tensor
    scales: Tensor
    offset: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``torch.ops.qsharded`` takes them."""
        return self.codes, self.absmax, self.scales, self.offset

    def packed(self) -> PackedWeight:
        """As ``qsharded.quant`` takes it."""
        return PackedWeight(*self.arguments(), formats.NF4_64)

    def dequantized(self) -> Tensor:
        """The fp64 weight."""
        absmax = formats.dequantize_absmax(self.absmax, self.scales, self.offset)
        return formats.dequantize_blocks(self.codes, absmax, torch.float32).double()

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.arguments())

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        N, K = self.weight.shape
        return N, K

    def conversion(self, op: str, contenders: list[Contender]) -> Case:
        """Between bf16 and NF4, either way: bound by memory."""
        moved = self.bytes + self.weight.nbytes
        return Case(op, self.shape, None, moved, 0, self.dequantized(), contenders)

    def product(self, op: str, expected: Tensor, contenders: list[Contender], baseline: str) -> Case:
        """Of bf16 activations with the weight, either way round. ``expected``: fp64, a row for each of theirs."""
        M, (N, K) = expected.shape[0], self.shape
        moved = self.bytes + 2 * M * (N + K)
        return Case(op, self.shape, M, moved, 2 * M * N * K, expected, contenders, baseline)


@cache
def random_weight(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Normal bf16 weights of a trained layer's size."""
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16()


@cache
def pack(shape: tuple[int, int], device: torch.device) -> Packed:
    """By the reference."""
    weight = random_weight(shape, device)
    packed = formats.quantize(weight)
    assert packed.absmax_codes is not None
    assert packed.absmax_scales is not None
    assert packed.absmax_offset is not None
    return Packed(weight, packed.codes, packed.absmax_codes, packed.absmax_scales, packed.absmax_offset)


def forget_weights() -> None:
    """Give the memory of the last shape back."""
    random_weight.cache_clear()
    pack.cache_clear()
