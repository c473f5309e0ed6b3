"""The format's sizes, and what every backend assumes and makes of its arguments. Users' mistakes are caught further up.

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row.
"""

import torch
from torch import Tensor

BLOCK = 64  # weights that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a second-level scale
CODES = 16
MIDPOINTS = CODES - 1
ABSMAX_THRESHOLDS = 255
ALIGNMENT = 16  # bytes that a GPU's thread reads or writes at a time


def second_level_blocks(values: int) -> int:
    """How many second-level blocks hold so many absmax values."""
    return -(-values // ABSMAX_BLOCK)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and beginning where a GPU's wide accesses may; a copy only of a view that does not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def prepare_quantize(weight_NK: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as kernels read it, and memory for its codes uint8 [N, P] and absmax fp32 [N, G]."""
    weight_NK = aligned(weight_NK)
    N, K = weight_NK.shape
    assert K % BLOCK == 0, weight_NK.shape
    _assert_table(midpoints, MIDPOINTS)
    codes_NP = weight_NK.new_empty(N, K // 2, dtype=torch.uint8)
    return weight_NK, codes_NP, weight_NK.new_empty(N, K // BLOCK, dtype=torch.float32)


def readable(codes_NP: Tensor, absmax_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Both as kernels read them: codes in one run, and each row's absmax in one."""
    return aligned(codes_NP), absmax_NG if absmax_NG.stride(1) == 1 else absmax_NG.contiguous()


def prepare_dequantize(
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    codebook: Tensor,
    absmax_map: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and absmax as kernels read them, and memory for the weight [N, K]: ``out`` where it is given."""
    codes_NP, absmax_NG = readable(codes_NP, absmax_NG)
    assert_encoded(codes_NP, absmax_NG, absmax_scales, absmax_offset, codebook, absmax_map)
    shape = codes_NP.shape[0], codes_NP.shape[1] * 2
    if out is None:
        return codes_NP, absmax_NG, codes_NP.new_empty(shape, dtype=out_dtype)
    assert (tuple(out.shape), out.dtype) == (shape, out_dtype), (out.shape, out.dtype, shape, out_dtype)
    assert out.stride(1) == 1
    assert out.data_ptr() % ALIGNMENT == 0
    assert out.stride(0) * out.itemsize % ALIGNMENT == 0
    return codes_NP, absmax_NG, out


def assert_encoded(
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    codebook: Tensor,
    absmax_map: Tensor | None,
) -> None:
    """What whoever dequantizes a packed weight assumes."""
    _assert_table(codebook, CODES)
    assert_packed(codes_NP, absmax_NG, absmax_scales, absmax_offset, absmax_map)


def assert_packed(
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    absmax_map: Tensor | None,
) -> None:
    """What whoever reads a packed weight assumes."""
    N, G = absmax_NG.shape
    assert codes_NP.shape == (N, G * BLOCK // 2), (codes_NP.shape, absmax_NG.shape)
    assert codes_NP.is_contiguous()
    assert codes_NP.dtype == torch.uint8
    assert absmax_NG.stride(1) == 1
    if absmax_scales is None:
        assert absmax_NG.dtype == torch.float32
        return
    assert absmax_NG.dtype == torch.uint8
    _assert_table(absmax_scales, second_level_blocks(N * G))
    _assert_table(absmax_offset, 1)
    _assert_table(absmax_map, 256)


def prepare_absmax(absmax_NG: Tensor) -> Tensor:
    """fp32 absmax as the kernels of double quantization read it."""
    assert absmax_NG.dtype == torch.float32
    return absmax_NG.contiguous()


def prepare_row_sums(row_sums_N: Tensor) -> Tensor:
    """The fp64 row sums of such absmax, likewise."""
    assert row_sums_N.dtype == torch.float64
    assert row_sums_N.numel() > 0, "a weight without rows has no mean"
    return row_sums_N.contiguous()


def assert_second_level(absmax_NG: Tensor, first: int, scales: Tensor, offset: Tensor, thresholds: Tensor) -> None:
    """What encodes absmax values, from value ``first`` of their weight on, assumes of the rest."""
    assert scales.dtype == torch.float32
    assert scales.is_contiguous()
    assert scales.numel() * ABSMAX_BLOCK >= first + absmax_NG.numel(), (scales.shape, first, absmax_NG.shape)
    _assert_table(offset, 1)
    _assert_table(thresholds, ABSMAX_THRESHOLDS)


def _assert_table(table: Tensor | None, entries: int) -> None:
    assert table is not None
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    assert table.numel() == entries, (table.shape, entries)
