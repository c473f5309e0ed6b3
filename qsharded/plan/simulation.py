"""How much memory a forward and backward takes, found by running the model's own code on the meta device.

Nothing is computed and nothing allocated, but every operation says which storages it makes, and Python says when they
are let go. What a GPU's kernels do otherwise than the meta device's is put in their place: they keep less for the
backward than PyTorch's composite operations, and some allocate a workspace that no tensor shows.

Axes: B batch, S sequence, D hidden size, H query heads, G key-value heads, E head dim.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made under this mode and that are still alive.

    Args:
        known: tensors that were there before and do not count.

    Attributes:
        peak: the most bytes alive at once, workspaces included.
        workspace: the largest workspace of one operation.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.workspace = 0

    def now(self) -> int:
        """Bytes alive."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):  # what comes from outside was there before
            key = StorageWeakRef(tensor.untyped_storage()).cdata
            if key not in self._alive:
                self._known.add(key)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._known:
                self._alive[reference.cdata] = (reference, storage.nbytes())
        workspace = _workspace(func, args)
        self.workspace = max(self.workspace, workspace)
        self.peak = max(self.peak, self.now() + workspace)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _workspace(func: Any, args: Any) -> int:
    """What an operation allocates for itself: a packed weight that it multiplies by is decoded, [N, K] in x's dtype."""
    packet = getattr(func, "overloadpacket", None)
    if packet in (torch.ops.qsharded.nf4_linear, torch.ops.qsharded.nf4_linear_input_grad):
        x, codes = args[0], args[1]
        return int(codes.numel()) * 2 * x.itemsize
    return 0


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
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args, kwargs.get("attn_mask"))
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


class _Attention(torch.autograd.Function):
    """A fused kernel: no scores; q, k, v, the output and the fp32 log-sum-exp are kept.

    A boolean mask, which flash attention does not take, is turned into an additive one and kept too. The backward adds
    up q's gradient in fp32, and with grouped heads has k's and v's once for every query head.
    """

    @staticmethod
    def forward(ctx: Any, q_BHSE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask: Tensor | None) -> Tensor:
        out_BHSE = torch.empty_like(q_BHSE)
        log_sum_exp_BHS = q_BHSE.new_empty(q_BHSE.shape[:3], dtype=torch.float32)
        additive = None if mask is None else torch.empty_like(mask, dtype=q_BHSE.dtype)
        ctx.save_for_backward(q_BHSE, k_BGTE, v_BGTE, out_BHSE, log_sum_exp_BHS, additive)
        return out_BHSE

    @staticmethod
    def backward(ctx: Any, grad_BHSE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSE, k_BGTE, v_BGTE, _, log_sum_exp_BHS, _ = ctx.saved_tensors
        sums = torch.empty_like(q_BHSE, dtype=torch.float32), torch.empty_like(log_sum_exp_BHS)
        per_head = [torch.empty_like(q_BHSE) for _ in range(2)] if k_BGTE.shape[1] != q_BHSE.shape[1] else []
        grads = torch.empty_like(q_BHSE), torch.empty_like(k_BGTE), torch.empty_like(v_BGTE)
        del sums, per_head
        return *grads, None
