"""Our kernels behind bitsandbytes' operations: ``torch.ops.bitsandbytes.*`` on NF4 in blocks of 64.

Whatever else an operation is called with (FP4, other block sizes, rows that are no whole blocks) goes to the kernel of
bitsandbytes that served it before. What is replaced is what was measured to be faster: on GPUs all four operations, on
CPUs quantizing (100 times) and the product for many rows; dequantizing is as fast there, and the product for one row
takes a layout of its own. The 8-bit AdamW step is replaced on GPUs for large tensors (``bitsandbytes_optimizer``).

Axes: N = out_features, K = in_features, P = K/2 code bytes, G = blocks in a row.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qsharded.integrations import bitsandbytes_optimizer
from qsharded.integrations.bitsandbytes_tables import is_table
from qsharded.quant import blockwise8, formats, ops
from qsharded.quant.packed_weight import PackedWeight

_Kernel = Callable[..., Any]
_NAMESPACE = "bitsandbytes"
_library: torch.library.Library | None = None


def install() -> None:
    """Put our kernels behind bitsandbytes' operations until :func:`uninstall`. Twice is as once."""
    global _library
    if _library is not None:
        return
    import bitsandbytes  # noqa: F401  (defines the operations)

    _library = torch.library.Library(_NAMESPACE, "IMPL")
    for key in ("CPU", "CUDA") if torch.cuda.is_available() else ("CPU",):
        for name, make in _REPLACED[key].items():
            before = torch.library.get_kernel(f"{_NAMESPACE}::{name}", key)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
                _library.impl(name, make(_Before(before, key)), key, allow_override=True)


def uninstall() -> None:
    """Give bitsandbytes its kernels back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


class _Before:
    """The kernel that served an operation on one kind of device before ours."""

    def __init__(self, kernel: Any, key: str) -> None:
        self.kernel, self.keys = kernel, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def __call__(self, *args: Any) -> Any:
        return self.kernel.call_boxed(self.keys, *args)


def _quantize(before: _Kernel) -> _Kernel:
    def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
        if not _is_ours(quant_type, blocksize) or A.numel() % formats.BLOCK or A.numel() == 0:
            return before(A, blocksize, quant_type, quant_storage)
        codes, absmax = ops.nf4_quantize(_in_whole_blocks(A))
        return codes.view(-1).view(quant_storage).unsqueeze(1), absmax.view(-1)

    return quantize_4bit


def _dequantize(before: _Kernel) -> _Kernel:
    def dequantize_4bit(
        A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        codes, numel = _bytes(A), math.prod(shape)
        if not _is_ours(quant_type, blocksize) or numel % formats.BLOCK or numel == 0:
            return before(A, absmax, blocksize, quant_type, shape, dtype)
        K = _row_length(shape, numel)
        packed = PackedWeight(codes.view(-1, K // 2), absmax.view(-1, K // formats.BLOCK), None, None, formats.NF4_64)
        dequantized = ops.nf4_dequantize(packed, dtype)
        return dequantized.view(tuple(shape))

    return dequantize_4bit


def _gemm(before: _Kernel) -> _Kernel:
    def gemm_4bit(
        A: Tensor,
        B: Tensor,
        shapeB: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        nested = (absmax_8bit, absmax_code, absmax_offset)
        known = absmax_code is None or is_table(absmax_code, blockwise8.dynamic_map(True, absmax_code.device))
        if not known or not _is_ours(quant_type, blocksize) or not _fits(A, shapeB):
            return before(A, B, shapeB, absmax, blocksize, quant_type, bias, *nested)
        return _product(A, B, shapeB, absmax, bias, absmax_8bit, absmax_offset)

    return gemm_4bit


def _gemv(before: _Kernel) -> _Kernel:
    def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
        if blocksize != formats.BLOCK or not _fits(A, shapeB) or not is_table(code, formats.codebook(code.device)):
            return before(A, B, shapeB, absmax, code, blocksize)
        return _product(A, B, shapeB, absmax)

    return gemv_4bit


_REPLACED: dict[str, dict[str, Callable[[_Kernel], _Kernel]]] = {
    "CPU": {"quantize_4bit": _quantize, "gemm_4bit": _gemm},
    "CUDA": {
        "quantize_4bit": _quantize,
        "dequantize_4bit": _dequantize,
        "gemm_4bit": _gemm,
        "gemv_4bit": _gemv,
        "optimizer_update_8bit_blockwise": bitsandbytes_optimizer.update,
    },
}


def _product(
    x: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    N, K = shape
    codes_NP = _bytes(codes).view(N, K // 2)
    if absmax_8bit is None:
        packed = PackedWeight(codes_NP, absmax.view(N, -1), None, None, formats.NF4_64)
    else:
        packed = PackedWeight(codes_NP, absmax_8bit.view(N, -1), absmax, offset, formats.NF4_64)
    return ops.nf4_linear(x, packed, bias)


def _is_ours(quant_type: str, blocksize: int) -> bool:
    return quant_type == "nf4" and blocksize == formats.BLOCK


def _fits(x: Tensor, shape: Sequence[int]) -> bool:
    """Rows of whole blocks, and numbers that our kernels multiply without dequantizing first."""
    return shape[1] % formats.BLOCK == 0 and x.shape[-1] == shape[1] and x.numel() > 0 and x.dtype != torch.float32


def _bytes(codes: Tensor) -> Tensor:
    return codes.reshape(-1).view(torch.uint8)


def _in_whole_blocks(weight: Tensor) -> Tensor:
    return weight.reshape(-1, _row_length(weight.shape, weight.numel()))


def _row_length(shape: Sequence[int], numel: int) -> int:
    """A row of the weight where it is whole blocks; else a block, as bitsandbytes cuts the flat weight."""
    return shape[-1] if shape[-1] % formats.BLOCK == 0 and numel % shape[-1] == 0 else formats.BLOCK
