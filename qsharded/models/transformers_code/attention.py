"""Attention for transformers' models: ours, where their code leaves documents and windows to the attention function.

That is what it does for FlashAttention, so a class that supports that one can have this one. Which tokens are of one
document its modules find in ``rows``, which the model sets before a forward.

Axes: B rows, S queries, T keys, H query heads, G key-value heads, E head dim.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qsharded.models.attention import attend
from qsharded.models.attention_inputs import AttentionInputs, attention_mask, has_flash_kernel
from qsharded.models.chunked_loss import capped
from qsharded.utils.documents import Boundaries

NAME = "qsharded"


@dataclass
class Rows:
    """The documents of a forward's rows.

    Attributes:
        documents_BT: int64, those of cached keys too; -1 is padding. None: a row is a document.
        boundaries: theirs, where they are known.
        made: attention inputs by window and lengths, which a forward's layers share.
    """

    documents_BT: Tensor | None = None
    boundaries: Boundaries | None = None
    made: dict[tuple[Any, ...], AttentionInputs] = field(default_factory=dict)


def register() -> None:
    """Let transformers' configurations name :func:`attention`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def attention(
    module: Any,
    q_BHSE: Tensor,
    k_BGTE: Tensor,
    v_BGTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The output [B, S, H, E], and no weights; the arguments are those of transformers' attention functions."""
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} lets tokens see later ones, which a causal language model must not")
    keys, E = k_BGTE.shape[2], q_BHSE.shape[-1]
    composed = s_aux is not None or dropout > 0 or v_BGTE.shape[-1] != E
    by_boundaries = not composed and (softcap is not None or _has_kernel(q_BHSE))
    inputs = _inputs(module.rows, q_BHSE, keys, sliding_window, by_boundaries)
    inputs = replace(inputs, scale=scaling, softcap=softcap)
    if composed:
        out_BHSE = _composed(q_BHSE, k_BGTE, v_BGTE, inputs, dropout, s_aux)
        return out_BHSE.transpose(1, 2).contiguous(), None
    return attend(q_BHSE.transpose(1, 2), k_BGTE.transpose(1, 2), v_BGTE.transpose(1, 2), inputs).contiguous(), None


def _has_kernel(q_BHSE: Tensor) -> bool:
    device = torch.device("cuda") if q_BHSE.is_meta else q_BHSE.device  # plans run layers there for a GPU
    return has_flash_kernel(device, q_BHSE.dtype, q_BHSE.shape[-1])


def _inputs(rows: Rows, q_BHSE: Tensor, keys: int, window: int | None, by_boundaries: bool) -> AttentionInputs:
    """Made once a forward for each window: a mask, or boundaries for what takes them."""
    key = (window, q_BHSE.shape[2], keys, by_boundaries)
    if key not in rows.made:
        rows.made[key] = _new_inputs(rows, q_BHSE, keys, window, by_boundaries)
    return rows.made[key]


def _new_inputs(rows: Rows, q_BHSE: Tensor, keys: int, window: int | None, by_boundaries: bool) -> AttentionInputs:
    B, _, queries, _ = q_BHSE.shape
    narrow = None if window is None or window >= keys else window
    none = q_BHSE.new_empty(0)  # q and k are rotated already
    if keys != queries or not by_boundaries:
        documents_BT = None if rows.documents_BT is None else rows.documents_BT[:, -keys:]
        mask_BST = attention_mask(queries, keys, documents_BT, narrow, q_BHSE.device)
        return AttentionInputs(none, none, window=narrow, mask_BST=mask_BST)
    boundaries = rows.boundaries
    if boundaries is None and rows.documents_BT is not None:
        boundaries = Boundaries.of(rows.documents_BT)
    if boundaries is None and narrow is not None:
        boundaries = Boundaries.of_rows(B, queries, q_BHSE.device)
    return AttentionInputs(none, none, window=narrow, boundaries=boundaries)


def _composed(
    q_BHSE: Tensor,
    k_BGTE: Tensor,
    v_BGTE: Tensor,
    inputs: AttentionInputs,
    dropout: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """As written, scores and all: for sinks, dropout, and values of another dim, which no kernel here has."""
    groups = q_BHSE.shape[1] // k_BGTE.shape[1]
    k_BHTE, v_BHTE = (tensor.repeat_interleave(groups, dim=1) for tensor in (k_BGTE, v_BGTE))
    scale = q_BHSE.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    scores_BHST = capped(q_BHSE @ k_BHTE.transpose(2, 3) * scale, inputs.softcap)
    scores_BHST = scores_BHST.masked_fill(~_mask(inputs, scores_BHST), -torch.inf).float()
    if sinks_H is not None:
        sinks_BHS1 = sinks_H.float().view(1, -1, 1, 1).expand(*scores_BHST.shape[:3], 1)
        weights_BHST = torch.cat((scores_BHST, sinks_BHS1), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights_BHST = scores_BHST.softmax(dim=-1)
    return F.dropout(weights_BHST.to(v_BHTE.dtype), dropout, training=dropout > 0) @ v_BHTE


def _mask(inputs: AttentionInputs, scores_BHST: Tensor) -> Tensor:
    if inputs.mask_BST is not None:
        return inputs.mask_BST
    queries, keys = scores_BHST.shape[2:]
    return torch.ones(queries, keys, dtype=torch.bool, device=scores_BHST.device).tril(keys - queries)
