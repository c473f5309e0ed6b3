"""``torch.ops.qsharded.*``: each operation's schema, shape rule (fake), implementation and gradient in one place.

Packed weights arrive as uint8. ``absmax`` is either fp32 [N, G], with ``absmax_scales`` and ``absmax_offset`` None, or
the double-quantized uint8 codes [N, G] with fp32 scales [ceil(N*G/256)] and offset []. ``quant_type`` and
``block_size`` are those of ``formats.QuantFormat``.

Axes: N = out_features, K = in_features, P = K/2 code bytes, B = block_size, G = K/B blocks in a row, M = rows of x over
all its leading dimensions.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from qsharded.quant import backends, formats
from qsharded.quant.formats import QuantFormat

_library = torch.library.Library("qsharded", "DEF")
_PACKED = "Tensor codes, Tensor absmax, Tensor? absmax_scales, Tensor? absmax_offset"
_KIND = "str quant_type='nf4', int block_size=64"
_library.define(f"nf4_quantize(Tensor weight, {_KIND}) -> (Tensor, Tensor)")
_library.define(f"nf4_dequantize({_PACKED}, ScalarType dtype, {_KIND}) -> Tensor")
# Two overloads: torch.library's autograd walks through all of a schema's arguments at every call that needs a gradient.
_library.define(f"nf4_linear(Tensor x, {_PACKED}, Tensor? bias) -> Tensor")
_library.define(f"nf4_linear.kind(Tensor x, {_PACKED}, Tensor? bias, str quant_type, int block_size) -> Tensor")
_library.define(f"nf4_linear_input_grad(Tensor grad, {_PACKED}, {_KIND}) -> Tensor")

# What a weight can be decoded to and multiplied in. fp64 is for gradcheck; the reference alone has it.
_DTYPES = (*formats.FLOAT_DTYPES, torch.float64)

_PLAIN = (Tensor, torch.nn.Parameter)

_quant_format = cache(QuantFormat)


def nf4_quantize(weight: Tensor, quant_type: str = "nf4", block_size: int = formats.BLOCK) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K/2] and absmax fp32 [N, K/B] of ``weight`` [N, K] (bfloat16, float16 or float32).

    Raises:
        ValueError: as ``nf4.check_weight``, but for NaN and infinity, which only the caller can look for cheaply; or
            no such format.
    """
    return torch.ops.qsharded.nf4_quantize(weight.detach(), quant_type, block_size)


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    """The weight [N, K] in ``dtype``: bfloat16, float16, float32, or float64, which holds the fp32 values.

    Raises:
        ValueError: another dtype, codes that are not uint8 [N, K/2], absmax, scales and offset that do not fit them, or
            no such format.
    """
    return torch.ops.qsharded.nf4_dequantize(codes, absmax, absmax_scales, absmax_offset, dtype, quant_type, block_size)


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    bias: Tensor | None = None,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    """``x @ W.T + bias``: x [..., K] -> [..., N] in x's dtype, W decoded to it. Gradients flow to x and bias only.

    Raises:
        ValueError: as ``nf4_dequantize``, or an x whose last axis is not K or whose dtype that refuses.
    """
    arguments = x, codes, absmax, absmax_scales, absmax_offset, bias
    if _needs_no_dispatch(*arguments):
        return _linear(*arguments, quant_type, block_size)
    if quant_type == "nf4" and block_size == formats.BLOCK:
        return torch.ops.qsharded.nf4_linear.default(*arguments)
    return torch.ops.qsharded.nf4_linear.kind(*arguments, quant_type, block_size)


def _needs_no_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but come to our implementation, 25 us later: no gradient is recorded,
    nobody watches, and all are tensors with memory of their own, which kernels ask for. Generating calls hundreds of
    layers a token."""
    if torch.is_grad_enabled() or x.is_meta or torch.compiler.is_compiling() or _is_watched():
        return False
    return type(x) in _PLAIN and all(other is None or type(other) in _PLAIN for other in others)


def _is_watched() -> bool:
    """By fake tensors or another mode, by ``torch.jit.trace``, or by ``torch.func``, whose tensors look plain."""
    if _get_current_dispatch_mode() is not None or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0:
        return True
    return torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None


def _check_packed(
    codes: Tensor, absmax: Tensor, absmax_scales: Tensor | None, absmax_offset: Tensor | None, quant_format: QuantFormat
) -> None:
    """What every operation on a packed weight asks of it; reads shapes and dtypes only."""
    B = quant_format.block_size
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % (B // 2):
        raise ValueError(f"codes must be uint8 [N, K/2] with K a multiple of {B}, got {_describe(codes)}")
    N, G = codes.shape[0], codes.shape[1] * 2 // B
    if tuple(absmax.shape) != (N, G):
        raise ValueError(f"absmax must be [N, K/{B}] = {[N, G]}, got {_describe(absmax)}")
    if (absmax_scales is None) != (absmax_offset is None):
        raise ValueError("absmax_scales and absmax_offset come together (double quantization) or not at all")
    if absmax_scales is None or absmax_offset is None:
        if absmax.dtype != torch.float32:
            raise ValueError(f"absmax without absmax_scales must be float32, got {absmax.dtype}")
        return
    if absmax.dtype != torch.uint8:
        raise ValueError(f"absmax with absmax_scales must be uint8 codes, got {absmax.dtype}")
    if absmax_scales.dtype != torch.float32 or tuple(absmax_scales.shape) != (formats.second_level_blocks(N, G),):
        wanted = formats.second_level_blocks(N, G)
        raise ValueError(f"absmax_scales must be float32 [{wanted}], got {_describe(absmax_scales)}")
    if absmax_offset.dtype != torch.float32 or absmax_offset.numel() != 1:
        raise ValueError(f"absmax_offset must be one float32, got {_describe(absmax_offset)}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_activations(x: Tensor, size: int, name: str) -> None:
    _check_dtype(x.dtype, name)
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name}'s last axis must be {size}, got {_describe(x)}")


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64, got {dtype}")


def _check_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    quant_format: QuantFormat,
) -> None:
    _check_packed(codes, absmax, absmax_scales, absmax_offset, quant_format)
    _check_activations(x, codes.shape[1] * 2, "x")
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (codes.shape[0],)):
        raise ValueError(f"bias must be {x.dtype} {[codes.shape[0]]}, got {_describe(bias)}")


def _autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """The caller's autocast must not reach the products inside: an operation's result has x's dtype."""
    quant_format = x.device.type
    return torch.autocast(quant_format, enabled=False) if torch.is_autocast_enabled(quant_format) else nullcontext()


@torch.library.impl(_library, "nf4_quantize", "CompositeExplicitAutograd")
def _quantize(weight: Tensor, quant_type: str = "nf4", block_size: int = formats.BLOCK) -> tuple[Tensor, Tensor]:
    quant_format = _quant_format(quant_type, block_size)
    _check_float_matrix(weight, quant_format)
    return backends.quantize(weight, quant_format)


@torch.library.register_fake("qsharded::nf4_quantize", lib=_library)
def _quantize_fake(weight: Tensor, quant_type: str = "nf4", block_size: int = formats.BLOCK) -> tuple[Tensor, Tensor]:
    _check_float_matrix(weight, _quant_format(quant_type, block_size))
    N, K = weight.shape
    codes = weight.new_empty((N, K // 2), dtype=torch.uint8)
    return codes, weight.new_empty((N, K // block_size), dtype=torch.float32)


def _check_float_matrix(weight: Tensor, quant_format: QuantFormat) -> None:
    B = quant_format.block_size
    if weight.dtype not in formats.FLOAT_DTYPES or weight.dim() != 2 or weight.shape[1] % B:
        raise ValueError(f"weight must be a float matrix [N, K] with K a multiple of {B}, got {_describe(weight)}")


@torch.library.impl(_library, "nf4_dequantize", "CompositeExplicitAutograd")
def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    dtype: torch.dtype,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    quant_format = _quant_format(quant_type, block_size)
    _check_packed(codes, absmax, absmax_scales, absmax_offset, quant_format)
    _check_dtype(dtype, "dtype")
    return backends.dequantize(codes, absmax, absmax_scales, absmax_offset, dtype, quant_format)


@torch.library.register_fake("qsharded::nf4_dequantize", lib=_library)
def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    dtype: torch.dtype,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    _check_packed(codes, absmax, absmax_scales, absmax_offset, _quant_format(quant_type, block_size))
    _check_dtype(dtype, "dtype")
    return codes.new_empty((codes.shape[0], codes.shape[1] * 2), dtype=dtype)


@torch.library.impl(_library, "nf4_linear", "CompositeExplicitAutograd")
@torch.library.impl(_library, "nf4_linear.kind", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    quant_format = _quant_format(quant_type, block_size)
    _check_linear(x, codes, absmax, absmax_scales, absmax_offset, bias, quant_format)
    with _autocast_off(x):
        return backends.linear(x, codes, absmax, absmax_scales, absmax_offset, bias, quant_format)


@torch.library.register_fake("qsharded::nf4_linear", lib=_library)
@torch.library.register_fake("qsharded::nf4_linear.kind", lib=_library)
def _linear_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    _check_linear(x, codes, absmax, absmax_scales, absmax_offset, bias, _quant_format(quant_type, block_size))
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.impl(_library, "nf4_linear_input_grad", "CompositeExplicitAutograd")
def _linear_input_grad(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    quant_format = _quant_format(quant_type, block_size)
    _check_packed(codes, absmax, absmax_scales, absmax_offset, quant_format)
    _check_activations(grad, codes.shape[0], "grad")
    weight = backends.dequantize(codes, absmax, absmax_scales, absmax_offset, grad.dtype, quant_format)
    with _autocast_off(grad):
        return grad.contiguous() @ weight


@torch.library.register_fake("qsharded::nf4_linear_input_grad", lib=_library)
def _linear_input_grad_fake(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> Tensor:
    _check_packed(codes, absmax, absmax_scales, absmax_offset, _quant_format(quant_type, block_size))
    _check_activations(grad, codes.shape[0], "grad")
    return grad.new_empty((*grad.shape[:-1], codes.shape[1] * 2))


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, absmax_scales, absmax_offset, _, *ctx.quant_format = inputs
    ctx.save_for_backward(codes, absmax, absmax_scales, absmax_offset)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Decodes the weight again: nothing decoded outlives the forward."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qsharded.nf4_linear_input_grad(grad, *ctx.saved_tensors, *ctx.quant_format)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, *(None for _ in ctx.quant_format)


for _name in ("qsharded::nf4_linear", "qsharded::nf4_linear.kind"):
    torch.library.register_autograd(_name, _linear_backward, setup_context=_save_packed, lib=_library)


def _save_packed_of_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, absmax_scales, absmax_offset, *ctx.quant_format = inputs
    ctx.save_for_backward(codes, absmax, absmax_scales, absmax_offset)


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, absmax, absmax_scales, absmax_offset = ctx.saved_tensors
    grad_grad = nf4_linear(grad, codes, absmax, absmax_scales, absmax_offset, None, *ctx.quant_format)
    return grad_grad, None, None, None, None, None, None


torch.library.register_autograd(
    "qsharded::nf4_linear_input_grad",
    _input_grad_backward,
    setup_context=_save_packed_of_input_grad,
    lib=_library,
)
