"""x W^T on an NF4 weight, decoded on the way into the tensor cores, by the compiled library (csrc/cuda/linear*).

Axes: M = rows of x, N = out_features, K = in_features, P = K/2 code bytes, G = K/64 blocks in a row.
The callers check what users pass; the assertions here guard raw memory.
"""

from functools import cache

import torch
from torch import Tensor

from . import checks, cuda, library

DTYPES = (torch.bfloat16, torch.float16)


def linear(
    x_MK: Tensor,
    codes_NP: Tensor,
    absmax_NG: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    codebook: Tensor,
    absmax_map: Tensor | None,
    bias_N: Tensor | None = None,
    *,
    factor: float,
) -> Tensor:
    """y = x W^T (+ bias) [M, N] in x's dtype, bf16 or fp16; W as in ``cuda_nf4.dequantize``.

    By sizes and device a weight is value * absmax in fp32, rounded once to x's dtype as ``dequantize`` rounds it; or
    value * ``factor`` rounded, a block's sum being multiplied by absmax / ``factor``; or, for one row of x, not rounded
    at all. Sums are fp32 and in an order that the sizes and the device fix: the same call gives the same bits. Captures
    in CUDA graphs. ``bias_N``: of x's dtype, added in fp32.

    Raises:
        ValueError: 2^37 weights and more, or more than 2^20 columns.
    """
    x_MK, codes_NP = checks.aligned(x_MK), checks.aligned(codes_NP)
    absmax_NG = absmax_NG if absmax_NG.stride(1) == 1 else absmax_NG.contiguous()
    (M, K), (N, G) = x_MK.shape, absmax_NG.shape
    checks.assert_encoded(codes_NP, absmax_NG, absmax_scales, absmax_offset, codebook, absmax_map)
    assert x_MK.dtype in DTYPES, x_MK.dtype
    assert K == G * checks.BLOCK, (K, G)
    if bias_N is not None:
        bias_N = bias_N.contiguous()
        assert (bias_N.shape, bias_N.dtype) == ((N,), x_MK.dtype), (bias_N.shape, bias_N.dtype)
    y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    dtype = library.DTYPES[x_MK.dtype]
    workspace = _workspace_bytes(x_MK.device, dtype, M, N, G)
    cuda.call(
        "nf4_linear",
        *(x_MK, dtype, M),
        *(codes_NP, N, G),
        *(absmax_NG, absmax_NG.stride(0), absmax_scales, absmax_offset, absmax_map),
        *(codebook, factor, bias_N, y_MN),
        torch.empty(workspace, dtype=torch.uint8, device=x_MK.device) if workspace else None,
    )
    return y_MN


@cache
def _workspace_bytes(device: torch.device, dtype: int, M: int, N: int, G: int) -> int:
    compiled = library.load()
    assert compiled is not None, "ask cuda.is_available() first"
    with torch.cuda.device(device):
        return compiled.qsharded_cuda_nf4_linear_workspace(dtype, M, N, G)
