"""Attention by whichever kernel suits the device and the rows; each gives its output and, as a function, its gradients.

    register_attention(lambda x, inputs, head_dim: MyAttention() if x.is_cuda else None)

Axes: B rows, S tokens of a row, T keys, H query heads, G key-value heads, E head dim.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsharded.models.attention_inputs import AttentionInputs, has_flash_kernel
from qsharded.models.sink_attention import attend_by_mask, with_sinks
from qsharded.models.softcap_attention import SoftcapAttention
from qsharded.models.window_attention import WindowAttention, agree

Saved = tuple[Any, ...]
"""What a backend keeps from its forward for its backward, beside q, k, v and the output."""


class Attention(Protocol):
    """softmax(cap(scale q k^T)) v for tokens that see what the inputs say; scale is 1 / sqrt(E) unless they say it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]:
        """q [B, S, H, E], k and v [B, T, G, E] -> the output [B, S, H, E], and what backward needs."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by q, k and v."""


FindAttention = Callable[[Tensor, AttentionInputs, int], Attention | None]

_registered: list[FindAttention] = []
_CUDNN_HEAD_DIM = 128
_MOST_FILLED_UP = 1.2
_TRIED_WINDOW = 1024


def register_attention(find: FindAttention) -> None:
    """Let a backend from outside serve layers, before those registered earlier and ours.

    Args:
        find: given a tensor [B, S, ...] of the layer's device and dtype, the layer's inputs and its head dim, the
            backend for them, or None to leave them to the others. It is asked in every forward of every layer.
    """
    _registered.insert(0, find)


def unregister_attention(find: FindAttention) -> None:
    """Take back what :func:`register_attention` did.

    Raises:
        ValueError: it is not registered.
    """
    if find not in _registered:
        raise ValueError(f"{find} is not registered: give the function that register_attention was given")
    _registered.remove(find)


def has_outside_attention() -> bool:
    """Whether any backend is registered from outside."""
    return bool(_registered)


def attend(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    """The output [B, S, H, E] with its gradients. q: [B, S, H, E]; k, v: [B, T, G, E]."""
    attention = _from_outside(q, inputs, q.shape[-1])
    if attention is None and inputs.sinks_H is not None and inputs.boundaries is None:
        return attend_by_mask(q, k, v, inputs)
    if attention is None and inputs.softcap is not None:
        attention = SoftcapAttention()
    if attention is None and inputs.boundaries is None:
        return SdpaAttention().forward(q, k, v, inputs)[0]
    out: Tensor = _Attend.apply(q, k, v, inputs, attention or FlashAttention())
    return out


def _from_outside(x: Tensor, inputs: AttentionInputs, head_dim: int) -> Attention | None:
    if inputs.sinks_H is not None:  # none from outside knows of them
        return None
    found = (find(x, inputs, head_dim) for find in _registered)
    return next((attention for attention in found if attention is not None), None)


def choose_attention(x_BSD: Tensor, inputs: AttentionInputs, head_dim: int) -> Attention:
    """The fastest backend for such rows on their device, or one from outside that wants them."""
    if attention := _from_outside(x_BSD, inputs, head_dim):
        return attention
    if inputs.softcap is not None:
        return SoftcapAttention()
    # the meta device stands for a GPU: plans run a layer there
    device = torch.device("cuda") if x_BSD.is_meta else x_BSD.device
    if inputs.mask_BST is not None or not has_flash_kernel(device, x_BSD.dtype, head_dim):
        return SdpaAttention()
    if not _is_fast_in_cudnn(x_BSD, head_dim):
        return FlashAttention()
    if inputs.window is not None:
        suits = _suits_two_halves(x_BSD.shape[1], inputs) and _halves_are_right(x_BSD.device, x_BSD.dtype, head_dim)
        return WindowAttention(CudnnAttention()) if suits else FlashAttention()
    return CudnnAttention() if inputs.boundaries is None and _is_planned_length(x_BSD.shape[1]) else FlashAttention()


def _is_fast_in_cudnn(x_BSD: Tensor, head_dim: int) -> bool:
    """cuDNN is faster on Hopper. Not every version of it has a backward for wider heads, such as Gemma 3's and Falcon
    3's of 256."""
    is_narrow = head_dim <= _CUDNN_HEAD_DIM
    return is_narrow and x_BSD.is_cuda and torch.cuda.get_device_capability(x_BSD.device)[0] == 9


def _is_planned_length(length: int) -> bool:
    """cuDNN plans each shape anew, in some milliseconds: it gets long rows of few lengths."""
    return length >= 1024 and length % 256 == 0


@cache
def _halves_are_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this machine's cuDNN does as it must for two halves: it is given another log-sum-exp than its own, of
    which its documentation says nothing. Tried once in a process, against FlashAttention."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, 3 * _TRIED_WINDOW, heads, head_dim) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    return agree(WindowAttention(CudnnAttention()), FlashAttention(), _TRIED_WINDOW, q, k, v)


def _suits_two_halves(length: int, inputs: AttentionInputs) -> bool:
    """cuDNN through PyTorch takes no window; as two causal halves it is faster than FlashAttention unless much of a
    row's last chunk is empty."""
    assert inputs.window is not None
    chunks = -(-length // inputs.window)
    is_full = chunks * inputs.window <= _MOST_FILLED_UP * length
    has_rows = inputs.boundaries is not None and inputs.boundaries.are_rows
    return has_rows and is_full and _is_planned_length(inputs.window)


class SdpaAttention:
    """PyTorch's own choice, on any device, with a mask where documents or windows ask for one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]:
        q_BHSE, k_BGTE, v_BGTE = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return _sdpa(q_BHSE, k_BGTE, v_BGTE, inputs.mask_BST, inputs.scale).transpose(1, 2), ()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the forward again, for PyTorch keeps what it needs to itself."""
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        with torch.enable_grad():
            again, _ = self.forward(leaves[0], leaves[1], leaves[2], inputs)
        grad_q, grad_k, grad_v = torch.autograd.grad(again, leaves, grad)
        return grad_q, grad_k, grad_v


def _sdpa(q_BHSE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask_BST: Tensor | None, scale: float | None) -> Tensor:
    """On the meta device, where plans run a layer, by the kernels that PyTorch takes on a GPU, which hold no scores."""
    groups = q_BHSE.shape[1] // k_BGTE.shape[1]
    if groups > 1 and q_BHSE.shape[2] == 1 and not q_BHSE.is_meta:
        return _one_query(q_BHSE, k_BGTE, v_BGTE, mask_BST, scale)
    if q_BHSE.is_meta and mask_BST is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q_BHSE, k_BGTE, v_BGTE, 0.0, True)[0]
    if mask_BST is None:
        causal = q_BHSE.shape[2] > 1
        return F.scaled_dot_product_attention(
            q_BHSE, k_BGTE, v_BGTE, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    # Of the fused GPU kernels only cuDNN's takes a mask and grouped heads at once, and it is not everywhere; the
    # fallback would hold all S x T scores. Repeating costs 5% where cuDNN would have served (H200, 4 x 2048 tokens).
    if groups > 1:
        k_BGTE, v_BGTE = (t.repeat_interleave(groups, dim=1) for t in (k_BGTE, v_BGTE))
    if q_BHSE.is_meta:
        additive = mask_BST.to(q_BHSE.dtype).expand(-1, q_BHSE.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q_BHSE, k_BGTE, v_BGTE, additive, True)[0]
    return F.scaled_dot_product_attention(q_BHSE, k_BGTE, v_BGTE, attn_mask=mask_BST, scale=scale)


def _one_query(q_BH1E: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask_B11T: Tensor | None, scale: float | None) -> Tensor:
    """The heads of a group as queries of one head, all with one sight: no kernel has to know of groups, and neither
    keys nor values are copied."""
    q_BGHE = q_BH1E.squeeze(2).unflatten(1, (k_BGTE.shape[1], -1))
    out_BGHE = F.scaled_dot_product_attention(q_BGHE, k_BGTE, v_BGTE, attn_mask=mask_B11T, scale=scale)
    return out_BGHE.flatten(1, 2).unsqueeze(2)


class FlashAttention:
    """FlashAttention 2 as PyTorch ships it, on GPUs: grouped heads, windows and documents without a mask.

    Source: Dao, "FlashAttention-2", arXiv:2307.08691.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]:
        rows = q.shape[:2]
        q, k, v = (_end_to_end(tensor, inputs) for tensor in (q, k, v))
        out, log_sum_exp, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(q, inputs), 0.0, True, False, scale=inputs.scale, **_window(inputs)
        )
        out = out.view(*rows, *out.shape[-2:])
        if inputs.sinks_H is not None:
            out, log_sum_exp = with_sinks(out, log_sum_exp, inputs.sinks_H)
        return out, (log_sum_exp, seed, offset)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_sum_exp, seed, offset = saved
        shapes = q.shape, k.shape, v.shape
        grad, q, k, v, out = (_end_to_end(tensor, inputs) for tensor in (grad, q, k, v, out))
        lengths = _lengths(q, inputs)
        grads = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, log_sum_exp, *lengths, 0.0, True, seed, offset, scale=inputs.scale, **_window(inputs)
        )
        grad_q, grad_k, grad_v = (grad.view(shape) for grad, shape in zip(grads, shapes, strict=True))
        return grad_q, grad_k, grad_v


class CudnnAttention:
    """cuDNN's kernel, for rows that are one document each and have no window."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Saved]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, *saved, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=inputs.scale
        )
        return out.transpose(1, 2), tuple(saved)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_sum_exp, starts_q, starts_k, most_q, most_k, seed, offset = saved
        grad, q, k, v, out = (tensor.transpose(1, 2) for tensor in (grad, q, k, v, out))
        lengths = starts_q, starts_k, most_q, most_k
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sum_exp, seed, offset, None, *lengths, 0.0, True, scale=inputs.scale
        )
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
        return grad_q, grad_k, grad_v


def _end_to_end(tensor: Tensor, inputs: AttentionInputs) -> Tensor:
    """All rows in one, where documents have boundaries; else as it is."""
    return tensor if inputs.boundaries is None else tensor.flatten(0, 1)


def _lengths(q: Tensor, inputs: AttentionInputs) -> tuple[Tensor | None, Tensor | None, int, int]:
    if inputs.boundaries is None:
        return None, None, q.shape[1], q.shape[1]
    starts, longest = inputs.boundaries.starts, inputs.boundaries.longest
    return starts, starts, longest, longest


def _window(inputs: AttentionInputs) -> dict[str, int]:
    return {} if inputs.window is None else {"window_size_left": inputs.window - 1, "window_size_right": 0}


class _Attend(torch.autograd.Function):
    """A backend between autograd's other nodes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, attention: Attention) -> Tensor:
        out, saved = attention.forward(q, k, v, inputs)
        ctx.inputs, ctx.attention = inputs, attention
        # tensors where checkpointing finds them, the rest beside
        ctx.plain = tuple(None if isinstance(value, Tensor) else (value,) for value in saved)
        ctx.save_for_backward(q, k, v, out, *(value for value in saved if isinstance(value, Tensor)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        saved = tuple(next(rest) if plain is None else plain[0] for plain in ctx.plain)
        return *ctx.attention.backward(grad, q, k, v, out, saved, ctx.inputs), None, None
