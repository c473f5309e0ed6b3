"""Few tokens sorted by their experts, on the device and in one launch, in Triton; the host need not know the counts.

One program counts each expert's tokens, then gives every pair of a token and an expert its place: behind those of
earlier experts, and within one in the order of the tokens. Each expert's run is cut into pieces of so many rows, which
``triton_grouped`` multiplies.

Axes: P = pairs, E experts, Q pieces.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PAIRS = 4096
MOST_EXPERTS = 1024
_AT_ONCE = 32  # pairs in a turn of the loop


class Places(NamedTuple):
    """Where pairs go.

    Attributes:
        order_P: int64, the pairs by their experts; 0 at the end, for those of no expert.
        position_P: int32, where each pair stands in that order; -1 for those of no expert.
        ends_E: int32, where each expert's run ends.
        pieces_Q3: int32, expert, first row and how many rows of each piece; as many as there can be, the last ones
            without rows.
    """

    order_P: Tensor
    position_P: Tensor
    ends_E: Tensor
    pieces_Q3: Tensor


def route(chosen_P: Tensor, experts: int, most: int) -> Places:
    """``chosen_P``: int64, each pair's expert, or ``experts`` for none. ``most``: rows of a piece."""
    P, device = chosen_P.numel(), chosen_P.device
    assert 0 < P <= MOST_PAIRS, P
    assert 0 < experts <= MOST_EXPERTS, experts
    assert chosen_P.is_contiguous()
    pieces = min(P, experts + P // most)
    # of one tensor, as every launch counts here: what is not written is 0
    ints = torch.zeros(experts + 3 * pieces, dtype=torch.int32, device=device)
    ends_E, pieces_Q3 = ints[:experts], ints[experts:].view(pieces, 3)
    order_P, position_P = torch.zeros_like(chosen_P), torch.empty(P, dtype=torch.int32, device=device)
    with torch.cuda.device_of(chosen_P):
        _route_kernel[(1,)](
            *(chosen_P, order_P, position_P, ends_E, pieces_Q3),
            P,
            experts,
            MOST=most,
            EXPERTS=triton.next_power_of_2(experts),
            AT_ONCE=_AT_ONCE,
            num_warps=8,
        )
    return Places(order_P, position_P, ends_E, pieces_Q3)


@triton.jit(do_not_specialize=["P"])
def _route_kernel(
    chosen_ptr,
    order_ptr,
    position_ptr,
    ends_ptr,
    pieces_ptr,
    P,
    E,
    MOST: tl.constexpr,
    EXPERTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    e, i = tl.arange(0, EXPERTS), tl.arange(0, AT_ONCE)
    counts_E = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, P, AT_ONCE):
        chosen_p = tl.load(chosen_ptr + start + i, mask=start + i < P, other=E).to(tl.int32)
        counts_E += tl.sum(_is_of(chosen_p, e, E), 0)
    ends_E = tl.cumsum(counts_E, 0)
    tl.store(ends_ptr + e, ends_E, mask=e < E)
    next_E = ends_E - counts_E
    for start in range(0, P, AT_ONCE):
        inside = start + i < P
        chosen_p = tl.load(chosen_ptr + start + i, mask=inside, other=E).to(tl.int32)
        of_pE = _is_of(chosen_p, e, E)
        before_pE = tl.cumsum(of_pE, 0) - of_pE
        place_p = tl.sum(of_pE * (next_E[None, :] + before_pE), 1)
        is_routed = inside & (chosen_p < E)
        tl.store(position_ptr + start + i, tl.where(is_routed, place_p, -1), mask=inside)
        tl.store(order_ptr + place_p, (start + i).to(tl.int64), mask=is_routed)
        next_E += tl.sum(of_pE, 0)
    pieces_E = (counts_E + MOST - 1) // MOST
    first_E = tl.cumsum(pieces_E, 0) - pieces_E
    for n in range(tl.max(pieces_E, 0)):
        has_E = n < pieces_E
        at = pieces_ptr + (first_E + n) * 3
        tl.store(at, e, mask=has_E)
        tl.store(at + 1, ends_E - counts_E + n * MOST, mask=has_E)
        tl.store(at + 2, tl.minimum(counts_E - n * MOST, MOST), mask=has_E)


@triton.jit
def _is_of(chosen_p, e, E):
    """int32 [pairs, E]: 1 where the pair is the expert's."""
    return ((chosen_p[:, None] == e[None, :]) & (e < E)[None, :]).to(tl.int32)
