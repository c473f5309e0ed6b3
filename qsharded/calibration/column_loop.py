"""The columns of one block rounded in turn, each one's error taken off those behind it in the block.

Axes: N = rows, B = weights in a block.
"""

import torch
from torch import Tensor

from qsharded.calibration.scale_search import decode_values, reciprocal
from qsharded.quant import backends, formats
from qsharded.quant.formats import QuantFormat


def round_columns(block_NB: Tensor, scales_N: Tensor, U_BB: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, B] of a block, and what is to be taken off later blocks: error fp32 [N, B] times their rows of U.

    For j from 0 on: code = nearest(w_j / s), e_j = (w_j - decoded) / U_jj, and w_k -= e_j U_jk for all k > j.

    Args:
        block_NB: fp32, contiguous; not changed.
        scales_N: fp32, of either sign.
        U_BB: fp32, upper: the block of the factor on the diagonal.
    """
    if not block_NB.is_cuda or backends.wanted_backend() == backends.REFERENCE:
        return round_columns_by_reference(block_NB, scales_N, U_BB, quant_format)
    from qsharded_kernels import triton_column_loop as kernel  # here: Triton loads slowly

    if block_NB.shape[1] > kernel.WIDEST:
        return round_columns_by_reference(block_NB, scales_N, U_BB, quant_format)
    return round_columns_by_triton(block_NB, scales_N, U_BB, quant_format)


def round_columns_by_triton(
    block_NB: Tensor, scales_N: Tensor, U_BB: Tensor, quant_format: QuantFormat
) -> tuple[Tensor, Tensor]:
    """The same by one kernel, to the same bits; B is at most its ``WIDEST``."""
    from qsharded_kernels import triton_column_loop as kernel

    device, quant_type = block_NB.device, quant_format.quant_type
    book = formats.codebook(device, quant_type)
    places = formats.ascending_codes(device, quant_type)
    reciprocals = reciprocal(scales_N), 1 / U_BB.diagonal()
    tables = book[places.int()], formats.thresholds(device, quant_type), places
    return kernel.round_columns(block_NB, scales_N.contiguous(), reciprocals[0], U_BB, reciprocals[1], *tables)


def round_columns_by_reference(
    block_NB: Tensor, scales_N: Tensor, U_BB: Tensor, quant_format: QuantFormat
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch. Every product and difference is rounded to fp32 on its own, as kernels do it too."""
    left_BN = block_NB.T.contiguous()  # a column is contiguous
    codes_BN = torch.empty(left_BN.shape, dtype=torch.uint8, device=left_BN.device)
    error_BN = torch.empty_like(left_BN)
    per_scale_N, per_pivot_B = reciprocal(scales_N), 1 / U_BB.diagonal()
    for j in range(left_BN.shape[0]):
        codes_BN[j] = formats.nearest_codes((left_BN[j] * per_scale_N).clamp_(-1, 1), quant_format.quant_type)
        decoded_N = decode_values(codes_BN[j], quant_format) * scales_N
        error_BN[j] = (left_BN[j] - decoded_N) * per_pivot_B[j]
        left_BN[j + 1 :] -= U_BB[j, j + 1 :, None] * error_BN[j]
    return codes_BN.T.contiguous(), error_BN.T.contiguous()
