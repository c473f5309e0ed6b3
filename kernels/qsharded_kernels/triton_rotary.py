"""Rotary embedding in Triton, of all heads of q and k at once, with Qwen3's norm of each head where a model has it.

    n = q / rms(q) * w  (or q),  out = n * cos + (-n_high | n_low) * sin

Pairs are (i, i + R/2) of a head's first R dims, or neighbours (2i, 2i + 1); the rest of a head is left as it is.

The forward works on the matrix [M, (H + 2G) E] that one product of the three projections writes: q's heads, k's, v's.
The backward gathers the three gradients that attention gives into such a matrix. Computed in fp32.

Axes: B rows, S tokens of a row, M = B S, H query heads, G key-value heads, E head dim, F = E / 2.
Source: Su et al., "RoFormer", arXiv:2104.09864.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def forward_(
    qkv: Tensor,
    cos_ME: Tensor,
    sin_ME: Tensor,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    *,
    head_dim: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """q and k of ``qkv`` [M, (H + 2G) E] rotated into ``out`` [M, at least (H + G) E], by default in place.

    ``cos``, ``sin``: [M, R], both halves of R alike. ``norms``: the weights [E] of q's and k's norm. ``head_dim``: E,
    by default R. ``interleaved``: neighbours are pairs.
    """
    out = qkv if out is None else out
    M, R = cos_ME.shape
    E = head_dim or R
    assert qkv.is_contiguous()
    assert out.is_contiguous()
    assert qkv.shape == (M, (heads + 2 * kv_heads) * E)
    q_norm, k_norm = norms or (cos_ME, cos_ME)
    with torch.cuda.device_of(qkv):
        _forward_kernel[(M,)](
            qkv,
            out,
            cos_ME,
            sin_ME,
            q_norm,
            k_norm,
            eps,
            qkv.shape[1],
            out.shape[1],
            H=heads,
            G=kv_heads,
            F=E // 2,
            PAIRS=cos_ME.shape[1] // 2,
            INTERLEAVED=interleaved,
            HEADS=triton.next_power_of_2(heads + kv_heads),
            HALF=triton.next_power_of_2(E // 2),
            NORM=norms is not None,
            num_warps=4,
        )
    return out


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    cos_ME: Tensor,
    sin_ME: Tensor,
    qkv: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    *,
    interleaved: bool = False,
) -> Tensor:
    """The gradient by ``qkv`` [M, (H + 2G) E] of those by rotated q [B, S, H, E], k and v [B, S, G, E], M = B S, whose
    heads are E values in a run.

    With ``norms``, ``qkv`` is what the forward was given.
    """
    grad_q, grad_k, grad_v = grads
    (B, S, heads, E), kv_heads = grad_q.shape, grad_k.shape[2]
    assert all(grad.stride(3) == 1 for grad in grads)
    out = grad_q.new_empty(B * S, (heads + 2 * kv_heads) * E)
    q_norm, k_norm = norms or (cos_ME, cos_ME)
    with torch.cuda.device_of(out):
        _backward_kernel[(B * S,)](
            grad_q,
            grad_k,
            grad_v,
            out if qkv is None else qkv,
            out,
            cos_ME,
            sin_ME,
            q_norm,
            k_norm,
            eps,
            S,
            *grad_q.stride()[:3],
            *grad_k.stride()[:3],
            *grad_v.stride()[:3],
            H=heads,
            G=kv_heads,
            F=E // 2,
            PAIRS=cos_ME.shape[1] // 2,
            INTERLEAVED=interleaved,
            HEADS=triton.next_power_of_2(heads + 2 * kv_heads),
            HALF=triton.next_power_of_2(E // 2),
            NORM=norms is not None,
            num_warps=4,
        )
    return out


@triton.jit
def _forward_kernel(
    qkv_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    qkv_stride,
    out_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < H + G) & (column < F)
    first, second = _pair(column, F, PAIRS, INTERLEAVED)
    at = head * 2 * F
    low = tl.load(qkv_ptr + token * qkv_stride + at + first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + token * qkv_stride + at + second, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        low_weight, high_weight = _norm_weights(q_norm_ptr, k_norm_ptr, head, first, second, inside, H)
        rstd = 1.0 / tl.sqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * F) + eps)
        low, high = low * rstd[:, None] * low_weight, high * rstd[:, None] * high_weight
    cos = tl.load(cos_ptr + token * 2 * PAIRS + column, mask=column < PAIRS, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * PAIRS + column, mask=column < PAIRS, other=0.0).to(tl.float32)
    kept = out_ptr.dtype.element_ty
    tl.store(out_ptr + token * out_stride + at + first, (low * cos - high * sin).to(kept), mask=inside)
    tl.store(out_ptr + token * out_stride + at + second, (high * cos + low * sin).to(kept), mask=inside)


@triton.jit
def _backward_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    qkv_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    S,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    H: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, place = token // S, token % S
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < H + 2 * G) & (column < F)
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + G), (head >= H + G) & (head < H + 2 * G)
    in_q = row * q_row + place * q_token + head * q_head
    in_k = row * k_row + place * k_token + (head - H) * k_head
    in_v = row * v_row + place * v_token + (head - H - G) * v_head
    first, second = _pair(column, F, PAIRS, INTERLEAVED)
    fits = column < F
    low = tl.load(grad_q_ptr + in_q + first, mask=is_q & fits, other=0.0).to(tl.float32)
    low += tl.load(grad_k_ptr + in_k + first, mask=is_k & fits, other=0.0).to(tl.float32)
    low += tl.load(grad_v_ptr + in_v + first, mask=is_v & fits, other=0.0).to(tl.float32)
    high = tl.load(grad_q_ptr + in_q + second, mask=is_q & fits, other=0.0).to(tl.float32)
    high += tl.load(grad_k_ptr + in_k + second, mask=is_k & fits, other=0.0).to(tl.float32)
    high += tl.load(grad_v_ptr + in_v + second, mask=is_v & fits, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * 2 * PAIRS + column, mask=column < PAIRS, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * PAIRS + column, mask=column < PAIRS, other=0.0).to(tl.float32)
    turned_low = tl.where(is_v, low, low * cos + high * sin)
    turned_high = tl.where(is_v, high, high * cos - low * sin)
    at = token * (H + 2 * G) * 2 * F + head * 2 * F
    if NORM:
        of_q_k = inside & (head < H + G)
        low_weight, high_weight = _norm_weights(q_norm_ptr, k_norm_ptr, head, first, second, of_q_k, H)
        x_low = tl.load(qkv_ptr + at + first, mask=inside, other=0.0).to(tl.float32)
        x_high = tl.load(qkv_ptr + at + second, mask=inside, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt((tl.sum(x_low * x_low, axis=1) + tl.sum(x_high * x_high, axis=1)) / (2 * F) + eps)
        rstd = rstd[:, None]
        n_low, n_high = turned_low * low_weight, turned_high * high_weight
        along = (tl.sum(n_low * x_low, axis=1) + tl.sum(n_high * x_high, axis=1))[:, None] * rstd * rstd / (2 * F)
        turned_low = tl.where(is_v, turned_low, rstd * (n_low - x_low * along))
        turned_high = tl.where(is_v, turned_high, rstd * (n_high - x_high * along))
    kept = out_ptr.dtype.element_ty
    tl.store(out_ptr + at + first, turned_low.to(kept), mask=inside)
    tl.store(out_ptr + at + second, turned_high.to(kept), mask=inside)


@triton.jit
def _pair(column, F: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Two dims of a head for each of F columns: those that are turned together, and behind the last pair the two halves
    of the rest."""
    first = column
    second = column + F
    if INTERLEAVED:
        first = tl.where(column < PAIRS, 2 * column, column + PAIRS)
        second = tl.where(column < PAIRS, 2 * column + 1, column + F)
    elif PAIRS < F:
        first = tl.where(column < PAIRS, column, column + PAIRS)
        second = tl.where(column < PAIRS, column + PAIRS, column + F)
    return first, second


@triton.jit
def _norm_weights(q_norm_ptr, k_norm_ptr, head, first, second, inside, H: tl.constexpr):
    """The norm's weight of both dims of a pair: q's for the first H heads, then k's."""
    from_q, from_k = inside & (head < H), inside & (head >= H)
    low = tl.load(q_norm_ptr + first, mask=from_q, other=0.0).to(tl.float32)
    low += tl.load(k_norm_ptr + first, mask=from_k, other=0.0).to(tl.float32)
    high = tl.load(q_norm_ptr + second, mask=from_q, other=0.0).to(tl.float32)
    high += tl.load(k_norm_ptr + second, mask=from_k, other=0.0).to(tl.float32)
    return low, high
