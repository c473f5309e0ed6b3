"""flash-linear-attention's kernel for the gated delta rule, where it is installed: on GPUs, in 16 bits.

It is optional: without it the rule runs in plain PyTorch. https://github.com/fla-org/flash-linear-attention
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qsharded.utils.documents import Boundaries

Rule = Callable[..., tuple[Tensor, Tensor | None]]


def fla_rule(x: Tensor) -> Rule | None:
    """The kernel, if it is there and serves tensors like ``x``."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return _installed() if x.is_cuda and is_half else None


@cache
def _installed() -> Rule | None:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    rule: Any = chunk_gated_delta_rule
    return rule


def run_rule(
    rule: Rule,
    q_BSGE: Tensor,
    k_BSGE: Tensor,
    v_BSHE: Tensor,
    log_kept_BSH: Tensor,
    beta_BSH: Tensor,
    boundaries: Boundaries | None,
) -> Tensor:
    """The output [B, S, H, Ev]; a state begins with each row, or with each document where ``boundaries`` are given."""
    groups = v_BSHE.shape[2] // k_BSGE.shape[2]
    q, k = (t.repeat_interleave(groups, dim=2) for t in (q_BSGE, k_BSGE))
    tensors = [q, k, v_BSHE, log_kept_BSH, beta_BSH]
    if boundaries is None:
        return rule(*tensors, use_qk_l2norm_in_kernel=True)[0]
    end_to_end = [tensor.flatten(0, 1)[None] for tensor in tensors]
    out, _ = rule(*end_to_end, use_qk_l2norm_in_kernel=True, cu_seqlens=boundaries.starts.long())
    return out.view(v_BSHE.shape)
