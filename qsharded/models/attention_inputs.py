"""What attention needs besides q, k and v, made once a step for all layers: rotary tables, and who may look at whom.

Axes: B batch, S queries, T keys (earlier, cached ones first, then the queries' own), E head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsharded.models.config import ModelConfig
from qsharded.models.rope import rope_tables
from qsharded.utils.documents import Boundaries

_LARGEST_HEAD_DIM = 256


def has_flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's FlashAttention serves, which takes documents and windows without a mask."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD_DIM


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer's attention takes beside q, k and v; layers with the same window share it.

    A query sees itself and earlier keys, of its own document alone. At most one of ``boundaries`` and ``mask_BST`` is
    there. Neither: causal among as many keys as queries, or one query that sees every key.

    Attributes:
        cos_BSE, sin_BSE: rotary tables [B or 1, S, E] in the activations' dtype.
        window: how many latest keys a query sees, itself included; None: all.
        boundaries: of the documents, where a kernel takes them.
        mask_BST: boolean [B or 1, 1, S, T], True where a query sees a key; window and documents are in it.
    """

    cos_BSE: Tensor
    sin_BSE: Tensor
    window: int | None = None
    boundaries: Boundaries | None = None
    mask_BST: Tensor | None = None


def attention_inputs(
    config: ModelConfig,
    positions_BS: Tensor,
    dtype: torch.dtype,
    *,
    documents_BT: Tensor | None = None,
    boundaries: Boundaries | None = None,
    keys: int | None = None,
    device: torch.device | None = None,
) -> dict[int | None, AttentionInputs]:
    """The inputs of every window that the model's layers have.

    Args:
        positions_BS: each query's place in its document.
        dtype: of the activations.
        documents_BT: each key's document; -1 is padding. None: a row is a document.
        boundaries: those of ``documents_BT``, if they are known already; without cached keys.
        keys: T, where there are cached ones before the queries; else S.
        device: to choose for; by default the positions'. A plan asks for a GPU's inputs on the meta device.
    """
    tables = rope_tables(config.rope, config.head_dim, positions_BS, dtype)
    device = device or positions_BS.device
    queries = positions_BS.shape[1]
    keys = queries if keys is None else keys
    uses_kernel = keys == queries and has_flash_kernel(device, dtype, config.head_dim)
    if not uses_kernel:
        boundaries = None
    elif boundaries is None and documents_BT is not None:
        boundaries = Boundaries.of(documents_BT)
    made: dict[int | None, AttentionInputs] = {}
    for window in set(config.layer_windows):
        narrow = None if window is None or window >= keys else window
        if not uses_kernel:
            mask_BST = attention_mask(queries, keys, documents_BT, narrow, positions_BS.device)
            made[window] = AttentionInputs(*tables, narrow, None, mask_BST)
        elif narrow is not None and boundaries is None:
            rows = Boundaries.of_rows(positions_BS.shape[0], queries, positions_BS.device)
            made[window] = AttentionInputs(*tables, narrow, rows)
        else:
            made[window] = AttentionInputs(*tables, narrow, boundaries)
    return made


def attention_mask(
    queries: int, keys: int, documents_BT: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Boolean `[B or 1, 1, S, T]`, True where a query sees a key.

    None where `attend` needs no mask: plain causal rows, and one query that sees every key.

    A query sees itself and earlier keys, the latest `window` of them if given, of its own document alone. Padding
    (document -1) is one more document: its rows see themselves, so no row is empty and softmax has no 0/0.
    """
    if window is not None and window >= keys:
        window = None
    if documents_BT is None and window is None and queries in (1, keys):
        return None
    key_T = torch.arange(keys, device=device)
    query_S1 = key_T[keys - queries :, None]
    mask_BST = (key_T <= query_S1)[None]
    if window is not None:
        mask_BST = mask_BST & (key_T > query_S1 - window)
    if documents_BT is not None:
        mask_BST = mask_BST & (documents_BT[:, keys - queries :, None] == documents_BT[:, None, :])
    return mask_BST[:, None]
