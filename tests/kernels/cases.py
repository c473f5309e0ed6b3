"""Weights and encodings that every NF4 backend is held to, and the comparison to the bit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.quant import blockwise8, formats

# no row: what a rank beyond the last row holds; K = 576 and 2880: 9 and 45 blocks a row, and 31 rows of 9 end inside a
# second-level block
SHAPES = [(0, 576), (1, 64), (1, 576), (7, 576), (31, 576), (3, 2880), (300, 64), (1000, 128)]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Unlike torch.equal this tells -0 from 0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differing = (actual.contiguous().view(integer) != expected.contiguous().view(integer)).sum()
    assert differing == 0, f"{differing} of {actual.numel()} differ"


def assert_within_an_ulp(y: Tensor, expected: Tensor) -> None:
    """Of y's type, whose subnormal numbers share one; zeros are zeros."""
    info = torch.finfo(y.dtype)
    ulp = info.eps * (2.0 ** expected.double().abs().log2().floor()).clamp(min=info.smallest_normal)
    off = ~((y.double() - expected.double()).abs() <= ulp)
    assert off.sum() == 0, f"{off.sum()} of {y.numel()} are off"
    assert (y[expected == 0] == 0).all()


def random_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def hard_weight(dtype: torch.dtype) -> Tensor:
    """One row per difficulty: zeros, signed zeros, subnormal and huge blocks, ties and their neighbours."""
    largest = torch.finfo(dtype).max
    ramp = torch.linspace(-1, 1, 64)
    ties = torch.cat([torch.tensor([1.0]), formats.thresholds(), torch.zeros(48)])
    rows = [
        torch.zeros(64),
        torch.zeros(64).neg(),
        ramp * torch.finfo(dtype).smallest_normal / 64,
        ramp * 1.2e-38,  # about where the divisor stops following absmax
        ramp * largest,
        ties,
        -ties,
        torch.nextafter(ties, torch.tensor(2.0)).clamp(max=1),
        torch.nextafter(ties, torch.tensor(-2.0)),
        torch.full((64,), largest),
    ]
    return torch.stack(rows).to(dtype)


def every_finite_half() -> Tensor:
    """Every fp16 that is a number, [N, 64]: subnormals and the largest among them."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return patterns[patterns.isfinite()].view(-1, 64)


@dataclass(frozen=True)
class Encoded:
    """What a dequantize function takes before out_dtype, and the fp32 absmax that it means."""

    codes: Tensor
    absmax: Tensor
    scales: Tensor | None
    offset: Tensor | None
    dequantized_absmax: Tensor
    quant_type: str = "nf4"  # whose codebook

    def arguments(self) -> tuple[Tensor | None, ...]:
        absmax_map = None if self.scales is None else blockwise8.dynamic_map()
        codebook = formats.codebook(quant_type=self.quant_type)
        return self.codes, self.absmax, self.scales, self.offset, codebook, absmax_map

    def expected(self, dtype: torch.dtype) -> Tensor:
        return formats.dequantize_blocks(
            self.codes, self.dequantized_absmax, dtype, formats.QuantFormat(self.quant_type)
        )


def double_quantized(rows: int, blocks_per_row: int, gap: int = 1) -> Encoded:
    """Random bytes in every place. The absmax rows lie a gap of bytes apart, as the padding of odd rows leaves them."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (rows, blocks_per_row * 32), dtype=torch.uint8, generator=generator)
    padded = torch.randint(256, (rows, blocks_per_row + gap), dtype=torch.uint8, generator=generator)
    absmax = padded[:, :blocks_per_row]
    scales = torch.rand(formats.second_level_blocks(rows, blocks_per_row), generator=generator)
    offset = torch.tensor(0.7123)
    return Encoded(codes, absmax, scales, offset, formats.dequantize_absmax(absmax, scales, offset))


def every_pair_of_bytes(quant_type: str = "nf4") -> Encoded:
    """All 65,536 patterns of two bytes, under absmax of all magnitudes, fp32 and in strided rows."""
    patterns = torch.arange(65536, dtype=torch.int32)
    codes = torch.stack([patterns >> 8, patterns & 255], dim=1).to(torch.uint8).view(512, 256)
    exponents = torch.linspace(-145, 127, 512 * 9).view(512, 9)
    absmax = (2.0**exponents)[:, :8]
    return Encoded(codes, absmax, None, None, absmax, quant_type)


def rounding_ties(dtype: torch.dtype) -> tuple[Encoded, Tensor]:
    """Weights of +-absmax that lie halfway between two neighbours in ``dtype``, bf16 or fp16, and what they round to.

    That is the neighbour whose last bit is 0: below in one half of the cases, above in the other. Random weights meet
    no tie.
    """
    top = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}[dtype]  # the largest number's bits
    below = torch.arange(0, top, 41, dtype=torch.int16)[:768]  # 41 is odd, so that every other one is
    neighbours = torch.stack([below, below + 1]).view(dtype)
    absmax = neighbours.double().mean(0).float().view(256, 3)
    codes = torch.full((256, 3 * 32), 0xF0, dtype=torch.uint8)  # the values 1 and -1, in turn
    even = (below + below % 2).view(dtype)
    expected = torch.stack([even, -even], dim=-1).repeat(1, 32)
    return Encoded(codes, absmax, None, None, absmax), expected.view(256, 3 * 64)


def fused_absmax(encoded: Encoded) -> Tensor:
    """What a fused multiply-add would give, rounded once; fp64 holds the product exactly."""
    assert encoded.scales is not None
    assert encoded.offset is not None
    scales = encoded.scales.repeat_interleave(256)[: encoded.absmax.numel()].view(encoded.absmax.shape)
    entries = blockwise8.dynamic_map()[encoded.absmax.int()]
    return (entries.double() * scales.double() + encoded.offset.double()).float()
