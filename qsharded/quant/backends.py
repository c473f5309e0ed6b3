"""Which implementation serves a device and a format: registered kernels, or the reference in ``formats``.

    register_kernels("cuda", "mine", lambda device: MyKernels())  # a subclass of qsharded.quant.kernels.Kernels

The last registered are asked first. Ours (the compiled library, Triton) are registered in the same way, below.
"""

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.quant import blockwise8, formats, own_kernels
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.kernels import AdaptedWeight, Kernels
from qsharded.quant.packed_weight import PackedWeight

REFERENCE = "reference"
Find = Callable[[torch.device], Kernels | None]

_registered: dict[str, dict[str, Find]] = {}


def register_kernels(device_type: str, name: str, find: Find) -> None:
    """Let kernels serve the devices of a type, before those that are registered for it already.

    Args:
        device_type: "cpu", "cuda" or another of PyTorch's.
        name: by which QSHARDED_BACKEND asks for them. Kernels of that name are replaced.
        find: the kernels that run on a device of the type, or None where they do not run.

    Raises:
        ValueError: the name of the reference.
    """
    if name == REFERENCE:
        raise ValueError(f"{REFERENCE!r} is plain PyTorch, which no kernels replace: give them another name")
    others = _registered.setdefault(device_type, {})
    others.pop(name, None)
    _registered[device_type] = {name: find, **others}
    _kernels.cache_clear()


def unregister_kernels(device_type: str, name: str) -> None:
    """Take back what :func:`register_kernels` did."""
    del _registered[device_type][name]
    _kernels.cache_clear()


def quantize(weight: Tensor, quant_format: QuantFormat = NF4_64) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a checked weight, by the fastest implementation for its device."""
    for kernels in _kernels(weight.device):
        if kernels.quantizes(quant_format):
            return kernels.quantize(weight, quant_format)
    return formats.quantize_blocks(weight, quant_format)


def dequantize(packed: PackedWeight, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] behind checked codes, by the fastest implementation for their device that has ``dtype``.

    ``out``: [N, K] of ``dtype`` to write to, each row contiguous and 16-byte aligned.
    """
    if _is_simulated(packed):
        return packed.codes.new_empty(packed.shape, dtype=dtype) if out is None else out
    for kernels in _kernels(packed.device):
        if kernels.dequantizes(packed.quant_format, dtype):
            return kernels.dequantize(packed, dtype, out)
    weight = dequantize_by_reference(packed, dtype)
    return weight if out is None else out.copy_(weight)


def dequantize_adapted(weights: list[AdaptedWeight], out: Tensor, tail: int) -> bool:
    """Weights of one format one below the other into ``out`` [N, K + tail], and their adapters' B, scaled, behind them,
    by one kernel where there is one; else nothing is done, and False returned."""
    if _is_simulated(weights[0][0]):
        return True
    for kernels in _kernels(out.device):
        if kernels.dequantizes(weights[0][0].quant_format, out.dtype):
            return kernels.dequantize_adapted(weights, out, tail)
    return False


def _is_simulated(packed: PackedWeight) -> bool:
    """Whether a plan runs a layer on the meta device, which stands for a GPU there: its kernels take no memory but
    their output's. What has none runs as it is written, and shows what it takes."""
    return packed.codes.is_meta and own_kernels.dequantizes(packed.quant_format)


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` of checked arguments: fused where kernels say that it pays, else W is dequantized first."""
    N, K = packed.shape
    M = x.shape[:-1].numel()
    for kernels in _kernels(packed.device):
        if kernels.multiplies(packed, M, x.dtype):
            return kernels.linear(x.reshape(-1, K), packed, bias).view(*x.shape[:-1], N)
    # The dequantized W is an ordinary tensor, freed on return: the caching allocator hands its memory to the next one
    # on this stream, and keeps it in the graph's pool during a capture. A workspace of our own would be held where
    # nothing is dequantized, and could not grow once a captured graph points at it.
    return F.linear(x, dequantize(packed, x.dtype), bias)


def input_grad(grad: Tensor, packed: PackedWeight) -> Tensor:
    """``grad @ W`` of checked arguments, likewise."""
    N, K = packed.shape
    M = grad.shape[:-1].numel()
    for kernels in _kernels(packed.device):
        if kernels.multiplies_grad(packed, M, grad.dtype):
            return kernels.input_grad(grad.reshape(-1, N), packed).view(*grad.shape[:-1], K)
    return grad.contiguous() @ dequantize(packed, grad.dtype)


def for_experts(shape: tuple[int, int], quant_format: QuantFormat, rows: float, like: Tensor) -> Kernels | None:
    """Those that multiply experts' weights [N, K], each with so many rows on average, faster than they are dequantized
    first; None where there are none. ``like``: such rows."""
    found = (k for k in _kernels(like.device) if k.multiplies_experts(shape, quant_format, rows, like.dtype))
    return next(found, None)


def dequantize_by_reference(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The same in plain PyTorch, on any device."""
    return formats.dequantize_blocks(packed.codes, packed.decoded_absmax(), dtype, packed.quant_format)


# Double quantization, whole and in the steps that ranks take together: as the functions of these names in ``formats``.


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, G], scales fp32 [ceil(N*G/256)] and offset fp32 [] of a whole weight's absmax, fp32 [N, G]."""
    steps = _absmax_steps(absmax.device)
    if steps is formats:
        return formats.double_quantize(absmax)
    return steps.double_quantize(absmax, blockwise8.thresholds(True, absmax.device))


def absmax_row_sums(absmax: Tensor) -> Tensor:
    """fp64 [N]: each row's columns added from left to right."""
    return _absmax_steps(absmax.device).absmax_row_sums(absmax)


def absmax_offset(row_sums: Tensor, G: int) -> Tensor:
    """fp32 [] on their device: the mean of a whole weight's absmax, from its row sums added from first to last."""
    return _absmax_steps(row_sums.device).absmax_offset(row_sums, G)


def absmax_scales(absmax: Tensor, offset: Tensor, *, first_row: int, rows: int) -> Tensor:
    """fp32 [ceil(rows*G/256)]: the maxima of the 256-blocks as far as these rows reach; 0 where they do not."""
    return _absmax_steps(absmax.device).absmax_scales(absmax, offset, first_row=first_row, rows=rows)


def encode_absmax(absmax: Tensor, scales: Tensor, offset: Tensor, *, first_row: int) -> Tensor:
    """uint8 [N, G] of the rows from ``first_row`` on, under the whole weight's scales and offset."""
    steps = _absmax_steps(absmax.device)
    if steps is formats:
        return formats.encode_absmax(absmax, scales, offset, first_row=first_row)
    thresholds = blockwise8.thresholds(True, absmax.device)
    return steps.encode_absmax(absmax, scales, offset, thresholds, first_row=first_row)


def _absmax_steps(device: torch.device) -> ModuleType:
    """Who double-quantizes there."""
    return next((kernels.absmax for kernels in _kernels(device) if kernels.absmax is not None), formats)


@cache
def wanted_backend() -> str | None:
    """What QSHARDED_BACKEND asks for, read once: one of the registered names, or None for the fastest that is there.

    Raises:
        ValueError: it names none of them.
    """
    name = os.environ.get("QSHARDED_BACKEND") or None
    names = [*dict.fromkeys(name for found in _registered.values() for name in found), REFERENCE]
    if name not in (None, *names):
        raise ValueError(f"QSHARDED_BACKEND must be one of {', '.join(names)}, got {name!r}")
    return name


def takes_triton(like: Tensor) -> bool:
    """Whether Triton's kernels that lie between products serve such a tensor: on a GPU, and not of float64, as they
    compute in float32."""
    return like.is_cuda and like.dtype != torch.float64 and wanted_backend() != REFERENCE


@cache
def _kernels(device: torch.device) -> tuple[Kernels, ...]:
    """The kernels to ask for a device, in turn; none where plain PyTorch has to do.

    Raises:
        ValueError: QSHARDED_BACKEND asks for some that do not serve it.
    """
    wanted = wanted_backend()
    if wanted == REFERENCE:
        return ()
    served = implementations(device)
    if wanted is None:
        return tuple(served.values())
    if wanted not in served:
        there = ", ".join([*served, REFERENCE])
        raise ValueError(f"QSHARDED_BACKEND={wanted} does not serve {device} here; what does: {there}")
    return (served[wanted],)


def implementations(device: torch.device) -> dict[str, Kernels]:
    """The kernels that run on a device by their names, the first to be asked first."""
    found = {name: find(device) for name, find in _registered.get(device.type, {}).items()}
    return {name: kernels for name, kernels in found.items() if kernels is not None}


def serving(device: torch.device) -> str:
    """Which kernels serve a device, for people to read; others that could follow in brackets.

    Raises:
        ValueError: as any operation there would: QSHARDED_BACKEND asks for one that does not serve it.
    """
    served, wanted = implementations(device), wanted_backend()
    _kernels(device)  # raises where what is asked for does not serve
    name = wanted or next(iter(served), REFERENCE)
    others = [other for other in (*served, REFERENCE) if other != name]
    asked = ", as QSHARDED_BACKEND asks" if wanted else ""
    return f"{name}{asked} (also there: {', '.join(others)})" if others else name + asked


register_kernels("cpu", "compiled", own_kernels.compiled_for_cpu)
register_kernels("cuda", "triton", own_kernels.triton_for_cuda)
register_kernels("cuda", "compiled", own_kernels.compiled_for_cuda)
