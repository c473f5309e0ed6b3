"""Two softmax averages over disjoint keys made one, in Triton; interpreted where there is no GPU.

    l = log(exp(l_1) + exp(l_2)),  out = exp(l_1 - l) out_1 + exp(l_2 - l) out_2

l are the log-sum-exps of the scores. Computed in fp32.

Axes: C chunks of W queries, n of them a row; P the chunks with one before them in their row; H heads, E head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def merge_(out: Tensor, log_sum: Tensor, flipped: Tensor, flipped_log_sum: Tensor, chunks_of_row: int) -> None:
    """What queries found in the chunk before theirs goes into what they found in their own, in place.

    Args:
        out, log_sum: of the own chunk, [C, W, H, E], and fp32 [C, H, W] in a run.
        flipped, flipped_log_sum: of the one before, [P, W, H, E] and fp32 [P, H, W], with the first W - 1 queries in
            opposite order, and the last, which is passed over.
        chunks_of_row: n.
    """
    P, W, H, E = flipped.shape
    assert out.stride(3) == flipped.stride(3) == 1
    assert log_sum.is_contiguous()
    assert flipped_log_sum.is_contiguous()
    with torch.cuda.device_of(out):
        _merge_kernel[(W - 1, P)](
            out,
            log_sum,
            flipped,
            flipped_log_sum,
            *out.stride()[:3],
            *flipped.stride()[:3],
            chunks_of_row,
            H,
            E,
            HEADS=triton.next_power_of_2(H),
            DIMS=triton.next_power_of_2(E),
        )


@triton.jit
def _merge_kernel(
    out_ptr,
    log_sum_ptr,
    flipped_ptr,
    flipped_log_sum_ptr,
    chunk_stride,
    query_stride,
    head_stride,
    flipped_chunk_stride,
    flipped_query_stride,
    flipped_head_stride,
    n,
    H,
    E,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    query, last = tl.program_id(0), tl.num_programs(0)
    late = tl.program_id(1).to(tl.int64)
    chunk = late // (n - 1) * n + late % (n - 1) + 1
    mirrored = last - 1 - query
    head, dim = tl.arange(0, HEADS), tl.arange(0, DIMS)
    is_head = head < H
    inside = is_head[:, None] & (dim < E)[None, :]
    at_log_sum = (chunk * H + head) * (last + 1) + query
    one = tl.load(log_sum_ptr + at_log_sum, mask=is_head, other=0.0)
    two = tl.load(flipped_log_sum_ptr + (late * H + head) * (last + 1) + mirrored, mask=is_head, other=0.0)
    at = out_ptr + chunk * chunk_stride + query * query_stride + head[:, None] * head_stride + dim[None, :]
    there = flipped_ptr + late * flipped_chunk_stride + mirrored * flipped_query_stride
    there += head[:, None] * flipped_head_stride + dim[None, :]
    own = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    # Several threads hold the same value where there are more of them than values: all have read before one writes.
    tl.debug_barrier()
    largest = tl.maximum(one, two)
    both = largest + tl.log(tl.exp(one - largest) + tl.exp(two - largest))
    tl.store(log_sum_ptr + at_log_sum, both, mask=is_head)
    out = own * tl.exp(one - both)[:, None] + before * tl.exp(two - both)[:, None]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
