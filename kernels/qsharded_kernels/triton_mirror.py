"""Tokens of chunks copied, or added, in opposite order, in Triton; interpreted where there is no GPU.

    there[p, i] = here[chunk, j],    here[chunk, j] += there[p, i],    with j = (W - 1 - shift - i) mod W
    chunk = p // (n - 1) * n + p % (n - 1) + shift

Pair p is of two chunks that follow each other in a row; ``shift`` 0 is the first of them, 1 the second. With 1 the last
token stays in its place.

Axes: C chunks of W tokens, n of them a row; P the pairs; H heads, E head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def mirrored(here: Tensor, chunks_of_row: int, shift: int) -> Tensor:
    """[P, W, H, E], dense, of [C, W, H, E], whose last axis is."""
    C, *rest = here.shape
    there = here.new_empty(C - C // chunks_of_row, *rest)
    _launch(here, there, chunks_of_row, shift, adds=False)
    return there


def add_mirrored_(here: Tensor, there: Tensor, chunks_of_row: int, shift: int) -> None:
    """Adds [P, W, H, E] where it belongs in [C, W, H, E]; with ``shift`` 1 the last token of each is passed over."""
    _launch(here, there, chunks_of_row, shift, adds=True)


def _launch(here: Tensor, there: Tensor, chunks_of_row: int, shift: int, adds: bool) -> None:
    P, W, H, E = there.shape
    assert here.stride(3) == there.stride(3) == 1
    if not P:
        return
    with torch.cuda.device_of(here):
        _mirror_kernel[(W, P)](
            here,
            there,
            *here.stride()[:3],
            *there.stride()[:3],
            chunks_of_row,
            shift,
            H,
            E,
            HEADS=triton.next_power_of_2(H),
            DIMS=triton.next_power_of_2(E),
            ADDS=adds,
        )


@triton.jit
def _mirror_kernel(
    here_ptr,
    there_ptr,
    here_chunk_stride,
    here_token_stride,
    here_head_stride,
    there_chunk_stride,
    there_token_stride,
    there_head_stride,
    n,
    shift,
    H,
    E,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    ADDS: tl.constexpr,
):
    i, W = tl.program_id(0), tl.num_programs(0)
    p = tl.program_id(1).to(tl.int64)
    chunk = p // (n - 1) * n + p % (n - 1) + shift
    j = (2 * W - 1 - shift - i) % W
    head, dim = tl.arange(0, HEADS), tl.arange(0, DIMS)
    inside = (head < H)[:, None] & (dim < E)[None, :]
    here = here_ptr + chunk * here_chunk_stride + j * here_token_stride
    here += head[:, None] * here_head_stride + dim[None, :]
    there = there_ptr + p * there_chunk_stride + i * there_token_stride
    there += head[:, None] * there_head_stride + dim[None, :]
    if ADDS:
        inside = inside & ((shift == 0) | (j != W - 1))
        total = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        part = tl.load(there, mask=inside, other=0.0).to(tl.float32)
        # Several threads hold the same value where there are more of them than values: all have read before one writes.
        tl.debug_barrier()
        tl.store(here, (total + part).to(here_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(there, tl.load(here, mask=inside, other=0.0), mask=inside)
