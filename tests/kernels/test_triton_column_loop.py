"""The column loop in Triton against the reference, to the bit: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from qsharded.calibration.column_loop import round_columns_by_reference, round_columns_by_triton
from qsharded.calibration.second_moments import SecondMoments
from qsharded.quant import formats
from qsharded.quant.formats import QuantFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(N: int, B: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block, scales of both signs and one of 0, and a strided block of a factor."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(N, B, generator=generator) * 0.05
    scales = block.abs().amax(1) * torch.where(torch.arange(N) % 2 == 0, 0.93, -1.02)
    scales[3] = 0
    x = torch.randn(3 * B, 2 * B, generator=generator) @ torch.randn(2 * B, 2 * B, generator=generator)
    moments = SecondMoments(2 * B, torch.device("cpu"))
    moments.add(x)
    U = moments.damped("w").inverse_factor(torch.arange(2 * B))
    return block.to(DEVICE), scales.to(DEVICE), U.to(DEVICE)[B:, B:]


@pytest.mark.parametrize("quant_format", [QuantFormat(), QuantFormat("fp4", 32), QuantFormat("nf4", 128)], ids=str)
def test_codes_and_errors_are_the_references(quant_format: QuantFormat) -> None:
    block, scales, U = case(37, quant_format.block_size, seed=0)
    before = block.clone()
    expected, found = (
        by(block, scales, U, quant_format) for by in (round_columns_by_reference, round_columns_by_triton)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(block, before)
    # errors are passed on: codes of the block by itself are others
    alone = (block / scales[:, None].abs().clamp(min=1e-38).copysign(scales[:, None])).clamp(-1, 1)
    assert (formats.nearest_codes(alone, quant_format.quant_type) != found[0]).float().mean() > 0.05


def test_a_tie_goes_down() -> None:
    """Weights that are midpoints times a scale of 1, without anything passed on."""
    block = formats.thresholds(torch.device(DEVICE))[torch.arange(64, device=DEVICE) % 15].repeat(4, 1).contiguous()
    scales, U = torch.ones(4, device=DEVICE), torch.eye(64, device=DEVICE)
    codes, _ = round_columns_by_triton(block, scales, U, QuantFormat())
    assert torch.equal(codes[0].cpu(), (torch.arange(64) % 15).to(torch.uint8))
    assert torch.equal(codes, round_columns_by_reference(block, scales, U, QuantFormat())[0])
