"""``torch.ops.qsharded.*``: each operation's schema, argument check, implementation, output's shape and gradient.

The schemas are flat: a packed weight comes as the four tensors of :class:`PackedWeight`, and its format as
``quant_type`` and ``block_size``. In Python the functions here take values.

Axes: N = out_features, K = in_features, B = block_size, G = K/B blocks in a row.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from qsharded.quant import backends, formats
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.packed_weight import PackedWeight, described

_library = torch.library.Library("qsharded", "DEF")
_PACKED = "Tensor codes, Tensor absmax, Tensor? absmax_scales, Tensor? absmax_offset"
_FORMAT = "str quant_type='nf4', int block_size=64"
_library.define(f"nf4_quantize(Tensor weight, {_FORMAT}) -> (Tensor, Tensor)")
_library.define(f"nf4_dequantize({_PACKED}, ScalarType dtype, {_FORMAT}) -> Tensor")
# Two overloads: torch.library's autograd walks through all of a schema's arguments at every call that needs a gradient.
_library.define(f"nf4_linear(Tensor x, {_PACKED}, Tensor? bias) -> Tensor")
_library.define(f"nf4_linear.kind(Tensor x, {_PACKED}, Tensor? bias, str quant_type, int block_size) -> Tensor")
_library.define(f"nf4_linear_input_grad(Tensor grad, {_PACKED}, {_FORMAT}) -> Tensor")

# What a weight can be dequantized to and multiplied in. fp64 is for gradcheck; the reference alone has it.
_DTYPES = (*formats.FLOAT_DTYPES, torch.float64)

_PLAIN = (Tensor, torch.nn.Parameter)

_quant_format = cache(QuantFormat)


def nf4_quantize(weight: Tensor, quant_format: QuantFormat = NF4_64) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K/2] and scales [N, K/B] (for NF4 absmax, fp32) of ``weight`` [N, K] in 16 or 32 bits.

    Raises:
        ValueError: as ``formats.check_weight``, but for NaN and infinity, which only the caller can look for cheaply.
    """
    return torch.ops.qsharded.nf4_quantize(weight.detach(), quant_format.quant_type, quant_format.block_size)


def nf4_dequantize(packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight [N, K] in ``dtype``: bfloat16, float16, float32, or float64, which holds the fp32 values.

    Raises:
        ValueError: another dtype, or as :meth:`PackedWeight.check`.
    """
    quant_format = packed.quant_format
    named = quant_format.quant_type, quant_format.block_size
    return torch.ops.qsharded.nf4_dequantize(*packed.tensors, dtype, *named)


def nf4_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``: x [..., K] -> [..., N] in x's dtype, W dequantized to it. Gradients flow to x and bias only.

    Raises:
        ValueError: as ``nf4_dequantize``, or an x whose last axis is not K or whose dtype that refuses.
    """
    quant_format = packed.quant_format
    arguments = x, *packed.tensors, bias
    if _needs_no_dispatch(*arguments):
        return _LINEAR(x, packed, bias)
    if quant_format.quant_type == "nf4" and quant_format.block_size == formats.BLOCK:
        return torch.ops.qsharded.nf4_linear.default(*arguments)
    return torch.ops.qsharded.nf4_linear.kind(*arguments, quant_format.quant_type, quant_format.block_size)


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


@dataclass(frozen=True)
class _Operation:
    """One operation, each of its parts written once.

    Attributes:
        values: from the schema's arguments, whose trailing defaults may be missing, to those of the other three.
        check: raises ValueError where they do not fit; reads shapes and dtypes only.
        compute: the result of checked ones.
        output: an empty result for checked ones.
    """

    values: Callable[..., tuple[Any, ...]]
    check: Callable[..., None]
    compute: Callable[..., Any]
    output: Callable[..., Any]

    def __call__(self, *values: Any) -> Any:
        self.check(*values)
        return self.compute(*values)

    def _fake(self, *arguments: Any, **named: Any) -> Any:
        values = self.values(*arguments, **named)
        self.check(*values)
        return self.output(*values)

    def serve(self, *names: str) -> None:
        """Put it behind the operations of these names, whatever the device."""
        for name in names:
            implementation = lambda *arguments, **named: self(*self.values(*arguments, **named))  # noqa: E731
            torch.library.impl(_library, name, "CompositeExplicitAutograd")(implementation)
            torch.library.register_fake(f"qsharded::{name}", self._fake, lib=_library)


def _check_activations(x: Tensor, size: int, name: str) -> None:
    _check_dtype(x.dtype, name)
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name}'s last axis must be {size}, got {described(x)}")


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64, got {dtype}")


def _autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """The caller's autocast must not reach the products inside: an operation's result has x's dtype."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _packed(
    codes: Tensor,
    absmax: Tensor,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
) -> PackedWeight:
    return PackedWeight(codes, absmax, absmax_scales, absmax_offset, _quant_format(quant_type, block_size))


def _quantize_values(weight: Tensor, *named: Any) -> tuple[Tensor, QuantFormat]:
    return weight, _quant_format(*named)


def _check_quantize(weight: Tensor, quant_format: QuantFormat) -> None:
    B = quant_format.block_size
    if weight.dtype not in formats.FLOAT_DTYPES or weight.dim() != 2 or weight.shape[1] % B:
        raise ValueError(f"weight must be a float matrix [N, K] with K a multiple of {B}, got {described(weight)}")


def _quantize_output(weight: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    codes = weight.new_empty((N, K // 2), dtype=torch.uint8)
    return codes, weight.new_empty((N, K // quant_format.block_size), dtype=quant_format.scale_encoding.dtype)


def _dequantize_values(*arguments: Any) -> tuple[PackedWeight, torch.dtype]:
    tensors, (dtype, *named) = arguments[:4], arguments[4:]
    return _packed(*tensors, *named), dtype


def _check_dequantize(packed: PackedWeight, dtype: torch.dtype) -> None:
    packed.check()
    _check_dtype(dtype, "dtype")


def _dequantize_output(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    return packed.codes.new_empty(packed.shape, dtype=dtype)


def _linear_values(x: Tensor, *arguments: Any) -> tuple[Tensor, PackedWeight, Tensor | None]:
    tensors, (bias, *named) = arguments[:4], arguments[4:]
    return x, _packed(*tensors, *named), bias


def _check_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    packed.check()
    N, K = packed.shape
    _check_activations(x, K, "x")
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (N,)):
        raise ValueError(f"bias must be {x.dtype} {[N]}, got {described(bias)}")


def _linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    with _autocast_off(x):
        return backends.linear(x, packed, bias)


def _linear_output(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _input_grad_values(grad: Tensor, *arguments: Any) -> tuple[Tensor, PackedWeight]:
    return grad, _packed(*arguments)


def _check_input_grad(grad: Tensor, packed: PackedWeight) -> None:
    packed.check()
    _check_activations(grad, packed.shape[0], "grad")


def _input_grad(grad: Tensor, packed: PackedWeight) -> Tensor:
    with _autocast_off(grad):
        return backends.input_grad(grad, packed)


def _input_grad_output(grad: Tensor, packed: PackedWeight) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], packed.shape[1]))


_QUANTIZE = _Operation(_quantize_values, _check_quantize, backends.quantize, _quantize_output)
_DEQUANTIZE = _Operation(_dequantize_values, _check_dequantize, backends.dequantize, _dequantize_output)
_LINEAR = _Operation(_linear_values, _check_linear, _linear, _linear_output)
_INPUT_GRAD = _Operation(_input_grad_values, _check_input_grad, _input_grad, _input_grad_output)

_QUANTIZE.serve("nf4_quantize")
_DEQUANTIZE.serve("nf4_dequantize")
_LINEAR.serve("nf4_linear", "nf4_linear.kind")
_INPUT_GRAD.serve("nf4_linear_input_grad")


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, absmax_scales, absmax_offset, _, *ctx.named = inputs
    ctx.save_for_backward(codes, absmax, absmax_scales, absmax_offset)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Dequantizes the weight again: nothing dequantized outlives the forward."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qsharded.nf4_linear_input_grad(grad, *ctx.saved_tensors, *ctx.named)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, *(None for _ in ctx.named)


for _name in ("qsharded::nf4_linear", "qsharded::nf4_linear.kind"):
    torch.library.register_autograd(_name, _linear_backward, setup_context=_save_packed, lib=_library)


def _save_packed_of_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, absmax_scales, absmax_offset, *ctx.named = inputs
    ctx.save_for_backward(codes, absmax, absmax_scales, absmax_offset)


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad = nf4_linear(grad, _packed(*ctx.saved_tensors, *ctx.named))
    return grad_grad, None, None, None, None, None, None


torch.library.register_autograd(
    "qsharded::nf4_linear_input_grad",
    _input_grad_backward,
    setup_context=_save_packed_of_input_grad,
    lib=_library,
)
