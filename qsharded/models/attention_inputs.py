"""Who may look at whom. Axes: B batch, S queries, T keys (earlier, cached ones first, then the queries' own)."""

import torch
from torch import Tensor


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
