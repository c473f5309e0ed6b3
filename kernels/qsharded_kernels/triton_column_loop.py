"""The columns of one block rounded in turn, in Triton; without a GPU under TRITON_INTERPRET=1.

One launch in the place of some 500 of PyTorch's. Axes: N rows, R rows of one program, B weights in a block, C codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES = tl.constexpr(16)
WIDEST = 128  # a program keeps three tiles of its rows in registers
_ELEMENTS = 2048  # of a tile: with 4 warps 16 a thread
_WARPS = 4


def round_columns(
    block_NB: Tensor,
    scales_N: Tensor,
    per_scale_N: Tensor,
    U_BB: Tensor,
    per_pivot_B: Tensor,
    values_C: Tensor,
    thresholds: Tensor,
    codes_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, B] and errors fp32 [N, B] of ``block_NB``, fp32 [N, B], B a power of two up to ``WIDEST``.

    For j from 0 on: p_j = the number of thresholds below w_j * per_scale; e_j = (w_j - values[p_j] * scale) *
    per_pivot_j; w_k -= U_jk * e_j for all k > j; code = codes[p_j]. Every step is rounded to fp32, as PyTorch rounds.

    Args:
        scales_N, per_scale_N: fp32 [N], and the reciprocals.
        U_BB: fp32, zero below the diagonal; rows may be strided.
        per_pivot_B: fp32, the reciprocals of its diagonal.
        values_C: fp32 [16], the codebook in ascending order; codes_C: uint8 [16], their codes.
        thresholds: fp32 [15], the midpoints between them.
    """
    N, B = block_NB.shape
    assert B <= WIDEST, B
    assert B & (B - 1) == 0, B
    assert block_NB.is_contiguous()
    assert U_BB.stride(1) == 1
    assert values_C.numel() == codes_C.numel() == thresholds.numel() + 1 == CODES.value
    codes_NB = torch.empty(N, B, dtype=torch.uint8, device=block_NB.device)
    error_NB = torch.empty_like(block_NB)
    rows = _ELEMENTS // B
    with torch.cuda.device_of(block_NB):  # Triton launches on the current device
        _round_columns_kernel[(triton.cdiv(N, rows),)](
            block_NB,
            scales_N,
            per_scale_N,
            U_BB,
            U_BB.stride(0),
            per_pivot_B,
            values_C,
            thresholds,
            codes_C,
            codes_NB,
            error_NB,
            N,
            ROWS=rows,
            BLOCK=B,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # codes equal PyTorch's: products are rounded before they are subtracted
        )
    return codes_NB, error_NB


@triton.jit
def _round_columns_kernel(
    block_ptr,
    scale_ptr,
    per_scale_ptr,
    U_ptr,
    U_row_stride,
    per_pivot_ptr,
    values_ptr,
    thresholds_ptr,
    table_ptr,
    codes_ptr,
    error_ptr,
    rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < rows
    column_B = tl.arange(0, BLOCK)
    at_RB = row_R[:, None] * BLOCK + column_B[None, :]
    left_RB = tl.load(block_ptr + at_RB, mask=is_row_R[:, None], other=0.0)
    scale_R = tl.load(scale_ptr + row_R, mask=is_row_R, other=1.0)
    per_scale_R = tl.load(per_scale_ptr + row_R, mask=is_row_R, other=1.0)
    i_C = tl.arange(0, CODES)
    value_C = tl.load(values_ptr + i_C)
    code_C = tl.load(table_ptr + i_C).to(tl.int32)
    threshold_C = tl.load(thresholds_ptr + i_C, mask=i_C < CODES - 1, other=float("inf"))
    code_RB = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    error_RB = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for j in range(BLOCK):
        is_j_B = column_B == j
        left_R = tl.sum(tl.where(is_j_B[None, :], left_RB, 0.0), axis=1)  # exact: all others are 0
        place_R = tl.sum(((left_R * per_scale_R)[:, None] > threshold_C[None, :]).to(tl.int32), axis=1)
        is_place_RC = place_R[:, None] == i_C[None, :]
        decoded_R = tl.sum(tl.where(is_place_RC, value_C[None, :], 0.0), axis=1) * scale_R
        error_R = (left_R - decoded_R) * tl.load(per_pivot_ptr + j)
        code_R = tl.sum(tl.where(is_place_RC, code_C[None, :], 0), axis=1)
        code_RB = tl.where(is_j_B[None, :], code_R[:, None], code_RB)
        error_RB = tl.where(is_j_B[None, :], error_R[:, None], error_RB)
        # U is 0 before j, and what this does to column j is not read again
        U_B = tl.load(U_ptr + j * U_row_stride + column_B)
        left_RB = left_RB - U_B[None, :] * error_R[:, None]
    tl.store(codes_ptr + at_RB, code_RB.to(tl.uint8), mask=is_row_R[:, None])
    tl.store(error_ptr + at_RB, error_RB, mask=is_row_R[:, None])
