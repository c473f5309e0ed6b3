"""How much memory a forward and backward takes, found by running the model's own code on the meta device.

Nothing is computed and nothing allocated, but every operation says which storages it makes, and Python says when they
are let go. What a GPU's kernels do otherwise than the meta device's is put in their place: they keep less for the
backward than PyTorch's composite operations, and some allocate a workspace that no tensor shows.

Axes: N out_features, K in_features.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qsharded.quant import formats
from qsharded.quant import ops as ops  # defines torch.ops.qsharded


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made under this mode and that are still alive.

    Args:
        known: tensors that were there before and do not count.

    Attributes:
        peak: the most bytes alive at once, workspaces included.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # references, not addresses alone: while one is held, no other storage gets that address
        self._known = {ref.cdata: ref for ref in map(_storage_of, known)}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        """Bytes alive."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for reference in map(_storage_of, _tensors((args, kwargs))):
            if reference.cdata not in self._alive:  # it comes from outside, so it was there before
                self._known.setdefault(reference.cdata, reference)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            reference = _storage_of(tensor)
            if reference.cdata not in self._known:
                self._alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        rule = _WORKSPACES.get(getattr(func, "overloadpacket", None))
        workspace = rule(*args) if rule else 0
        self.peak = max(self.peak, self.now() + workspace)
        return result


def _storage_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _dequantized(x: Tensor, codes: Tensor, *others: Any) -> int:
    """A packed weight that is multiplied by is dequantized, [N, K] in x's dtype; blocks other than 64 by PyTorch."""
    N, K = codes.shape[0], codes.shape[1] * 2
    # the last argument, which is not passed on here where it is at its default
    block_size = next((other for other in others if isinstance(other, int)), formats.BLOCK)
    return N * K * x.itemsize + (0 if block_size == formats.BLOCK else formats.dequantize_workspace(N, K))


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> int:
    """q's gradient is summed in fp32, beside a figure a row; with grouped heads k and v have theirs a query head.
    Heads and tokens come in either order."""
    fp32 = q.numel() + q.shape[:-1].numel()
    per_head = 2 * grad.nbytes if k.numel() != q.numel() else 0
    return fp32 * 4 + per_head


# What operations allocate for themselves and free, which no tensor shows.
_WORKSPACES: dict[Any, Callable[..., int]] = {
    torch.ops.qsharded.nf4_linear: _dequantized,
    torch.ops.qsharded.nf4_linear_input_grad: _dequantized,
    torch.ops.aten._flash_attention_backward: _attention_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
}


def as_on_gpu(module: nn.Module) -> None:
    """Have the forward of ``module`` allocate what a GPU's kernels do. Call before anything that recomputes it: a mode
    around the backward would be left where the backward begins."""
    forward = module.forward

    def under_mode(*args: Any) -> Any:
        with _AsOnGPU():
            return forward(*args)

    module.forward = under_mode


class _AsOnGPU(TorchFunctionMode):
    """Puts fused kernels in the place of composite operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return _RMSNorm.apply(args[0], kwargs["weight"])
        if func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]  # its mask takes a byte a value
        return func(*args, **kwargs)


class _RMSNorm(torch.autograd.Function):
    """The fused kernel: it keeps its input and one fp32 figure a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
