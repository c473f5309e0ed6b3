"""NF4's double quantization on NVIDIA GPUs by the compiled library (csrc/cuda/double_quantize.cu).

The steps work on whole rows of a weight that ranks share, and give the bytes of ``qsharded.nf4``'s.
Axes: N = these rows, G = absmax values in a row.
"""

import torch
from torch import Tensor

from . import checks, cuda


def double_quantize(absmax_NG: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, G], scales fp32 [ceil(N*G/256)] and offset fp32 [] of a whole weight's absmax, fp32 [N, G].

    ``thresholds``: fp32 [255], the midpoints between the second-level map's entries.
    """
    absmax_NG = absmax_NG.contiguous()
    N, G = absmax_NG.shape
    checks.assert_absmax(absmax_NG, thresholds)
    offset = absmax_NG.new_empty(())
    cuda.call("absmax_offset", absmax_row_sums(absmax_NG), N, N * G, offset)
    scales = absmax_NG.new_empty(checks.second_level_blocks(N * G))
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    cuda.call("absmax_scales_and_codes", absmax_NG, N * G, offset, thresholds, scales, codes_NG)
    return codes_NG, scales, offset


def absmax_row_sums(absmax_NG: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right."""
    absmax_NG = absmax_NG.contiguous()
    N, G = absmax_NG.shape
    sums_N = absmax_NG.new_empty(N, dtype=torch.float64)
    cuda.call("absmax_row_sums", absmax_NG, N, G, sums_N)
    return sums_N


def absmax_scales(absmax_NG: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of abs(absmax - offset) in 256-blocks, as far as these rows, from
    ``first_row`` on of a weight of ``rows`` rows, reach; 0 for blocks they do not touch."""
    absmax_NG = absmax_NG.contiguous()
    G = absmax_NG.shape[1]
    maxima = absmax_NG.new_zeros(checks.second_level_blocks(rows * G))
    cuda.call("absmax_scales", absmax_NG, first_row * G, absmax_NG.numel(), offset, maxima)
    return maxima


def encode_absmax(absmax_NG: Tensor, scales: Tensor, offset: Tensor, thresholds: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's ``scales`` and ``offset``."""
    absmax_NG = absmax_NG.contiguous()
    G = absmax_NG.shape[1]
    checks.assert_absmax(absmax_NG, thresholds)
    assert scales.numel() * checks.ABSMAX_BLOCK >= first_row * G + absmax_NG.numel()
    codes_NG = torch.empty_like(absmax_NG, dtype=torch.uint8)
    cuda.call("absmax_encode", absmax_NG, first_row * G, absmax_NG.numel(), offset, scales, thresholds, codes_NG)
    return codes_NG
