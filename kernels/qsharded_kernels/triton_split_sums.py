"""Partial sums of a product whose reduction is cut into parts, added from the first part to the last, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 256


def empty_partials(splits: int, M: int, columns: int, device: torch.device) -> Tensor:
    """fp32 [splits, M, columns] for parts to be written to."""
    return torch.empty(splits, M, columns, dtype=torch.float32, device=device)


def add_parts(partials_SMN: Tensor, out_MN: Tensor, bias_N: Tensor | None, scale: float) -> None:
    """out = scale * (partials[0] + partials[1] + ...) (+ bias), rounded once. The caller sets the device."""
    splits, M, N = partials_SMN.shape
    _sum_kernel[(triton.cdiv(N, _AT_ONCE), M)](
        *(partials_SMN, out_MN if bias_N is None else bias_N, out_MN, M, N, splits, scale),
        HAS_BIAS=bias_N is not None,
        AT_ONCE=_AT_ONCE,
    )


def splits_to_fill(tiles: int, programs_per_sm: int, device: torch.device) -> int:
    """Into how many parts the reduction is cut, so that so many tiles give each SM its programs."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, programs_per_sm * sms // tiles)


@triton.jit(do_not_specialize=["M", "splits"])  # one compilation for all of them
def _sum_kernel(partials_ptr, bias_ptr, out_ptr, M, N, splits, scale, HAS_BIAS: tl.constexpr, AT_ONCE: tl.constexpr):
    n = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    m = tl.program_id(1)
    sum_n = tl.zeros((AT_ONCE,), tl.float32)
    for split in range(splits):
        sum_n += tl.load(partials_ptr + (split * M + m).to(tl.int64) * N + n, mask=n < N, other=0)
    sum_n *= scale
    if HAS_BIAS:
        sum_n += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * N + n, sum_n.to(out_ptr.dtype.element_ty), mask=n < N)
