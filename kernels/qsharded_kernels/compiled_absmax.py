"""NF4's double quantization by the compiled library, on CPUs (csrc/cpu/absmax.cpp) and NVIDIA GPUs
(csrc/cuda/double_quantize.cu).

The steps work on whole rows of a weight that ranks share, and give the bytes of ``qsharded.quant.formats``'s.
Axes: N = these rows, G = absmax values in a row.
"""

import torch
from torch import Tensor

from . import checks, cpu, cuda


def double_quantize(absmax_NG: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, G], scales fp32 [ceil(N*G/256)] and offset fp32 [] of a whole weight's absmax, fp32 [N, G].

    ``thresholds``: fp32 [255], the midpoints between the second-level map's entries.
    """
    absmax_NG = checks.prepare_absmax(absmax_NG)
    N, G = absmax_NG.shape
    offset = absmax_offset(absmax_row_sums(absmax_NG), G)
    scales = absmax_NG.new_empty(checks.second_level_blocks(N * G))
    checks.assert_second_level(absmax_NG, 0, scales, offset, thresholds)
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    _call("absmax_scales_and_codes", absmax_NG, N * G, offset, thresholds, scales, codes_NG)
    return codes_NG, scales, offset


def absmax_row_sums(absmax_NG: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right."""
    absmax_NG = checks.prepare_absmax(absmax_NG)
    sums_N = absmax_NG.new_empty(absmax_NG.shape[0], dtype=torch.float64)
    _call("absmax_row_sums", absmax_NG, *absmax_NG.shape, sums_N)
    return sums_N


def absmax_offset(row_sums_N: Tensor, G: int) -> Tensor:
    """fp32 []: the mean of a whole weight's absmax, from its row sums added from first to last."""
    row_sums_N = checks.prepare_row_sums(row_sums_N)
    offset = row_sums_N.new_empty((), dtype=torch.float32)
    _call("absmax_offset", row_sums_N, row_sums_N.numel(), row_sums_N.numel() * G, offset)
    return offset


def absmax_scales(absmax_NG: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of abs(absmax - offset) in 256-blocks, as far as these rows, from
    ``first_row`` on of a weight of ``rows`` rows, reach; 0 for blocks they do not touch."""
    absmax_NG = checks.prepare_absmax(absmax_NG)
    N, G = absmax_NG.shape
    assert first_row + N <= rows, (first_row, N, rows)
    maxima = absmax_NG.new_zeros(checks.second_level_blocks(rows * G))
    _call("absmax_scales", absmax_NG, first_row * G, N * G, offset, maxima)
    return maxima


def encode_absmax(absmax_NG: Tensor, scales: Tensor, offset: Tensor, thresholds: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's ``scales`` and ``offset``."""
    absmax_NG = checks.prepare_absmax(absmax_NG)
    first = first_row * absmax_NG.shape[1]
    checks.assert_second_level(absmax_NG, first, scales, offset, thresholds)
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    _call("absmax_encode", absmax_NG, first, absmax_NG.numel(), offset, scales, thresholds, codes_NG)
    return codes_NG


def _call(function: str, absmax: Tensor, *arguments: Tensor | int) -> None:
    call = cuda.call if absmax.is_cuda else cpu.call
    call(function, absmax, *arguments)
