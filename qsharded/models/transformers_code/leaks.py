"""Whether a document in a packed row changes another: tried on the model that will train, not believed."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qsharded.models.parts import embedding_of
from qsharded.utils.documents import Boundaries

_LENGTH = 8


def leaks(model: Any) -> bool:
    """Whether any change of one document, however small, reaches the next one's logits.

    The derivatives by the first document's embeddings say so. They must be zero to the last bit, which holds in any
    dtype; logits before and after a perturbation would differ in their last bits where experts share their products.
    Every rank of a sharded model calls this. No gradients are left.
    """
    device = next(chain(model.buffers(), model.parameters())).device  # frozen parameters may wait in host memory
    ids_BS = torch.arange(2 * _LENGTH, device=device)[None] % model.config.vocab_size
    documents_BS = torch.arange(2, device=device).repeat_interleave(_LENGTH)[None]
    positions_BS = torch.arange(_LENGTH, device=device).repeat(2)[None]
    boundaries = Boundaries.of(documents_BS)
    embedded: list[Tensor] = []
    hook = embedding_of(model).register_forward_hook(lambda *call: _as_leaf(embedded, call[2]))
    try:
        with torch.enable_grad():
            logits_BSV = model(ids_BS, positions_BS=positions_BS, document_ids_BS=documents_BS, boundaries=boundaries)
            logits_BSV[:, _LENGTH:].float().square().mean().backward()
    finally:
        hook.remove()
        model.zero_grad()
    grad_BSD = embedded[0].grad
    assert grad_BSD is not None, "the logits do not depend on the embedding"
    return bool(grad_BSD[:, :_LENGTH].any())


def _as_leaf(embedded: list[Tensor], out: Tensor) -> Tensor:
    embedded.append(out.detach().requires_grad_())
    return embedded[-1]
