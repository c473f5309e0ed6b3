"""Embedding and head whose rows stay where they are: each rank holds V / W of them, and no rank ever gathers them.

These take the place of a decoder's ``embed_tokens`` and ``lm_head`` where both are frozen; what they compute across
ranks is in ``vocab_parallel_autograd`` and ``vocab_parallel_loss``. The weight stays a parameter of the same name, a
DTensor cut by rows (or a plain tensor on one rank), so that the checkpoint is read into it as into any other.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from qsharded.distributed import vocab_parallel_autograd, vocab_parallel_loss
from qsharded.models.chunked_loss import LOGITS_PER_CHUNK
from qsharded.models.decoder import Head
from qsharded.models.parts import embedding_of, head_of, part_names
from qsharded.utils.sharding import local, own_rows, rows_of_rank, shard_size_and_rank

LARGE_BYTES = 4 * LOGITS_PER_CHUNK
"""Above this a vocabulary is split: gathered whole it would outweigh the one chunk of logits that the loss holds."""


class VocabParallelEmbedding(nn.Module):
    """``nn.Embedding`` over the ranks of the weight's mesh: ids go to all, rows come back. Axes: V rows, D columns."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD

    @torch.compiler.disable
    def forward(self, ids_BS: Tensor) -> Tensor:
        """ids [B, S], of any size on each rank -> [B, S, D]. Every rank calls this."""
        found_TD = vocab_parallel_autograd.lookup(ids_BS.flatten(), local(self.weight), own_rows(self.weight))
        return found_TD.unflatten(0, ids_BS.shape)


class VocabParallelHead(Head):
    """The head over the ranks of the weight's mesh; logits are whole on the rank whose tokens they are of."""

    def __init__(self, weight_VD: nn.Parameter, softcap: float | None = None) -> None:
        super().__init__(weight_VD.shape[1], weight_VD.shape[0], softcap, device="meta")
        self.weight = weight_VD

    @torch.compiler.disable
    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None, *, per_token: bool = False) -> Tensor:
        """hidden [B, S, D], of any B and S on each rank -> logits, or the loss or log-probabilities of its tokens."""
        weight_vD = local(self.weight).to(hidden_BSD.device, hidden_BSD.dtype, non_blocking=True)
        rows, hidden_TD = own_rows(self.weight), hidden_BSD.flatten(0, 1)
        if targets_BS is None:
            return vocab_parallel_autograd.logits(hidden_TD, weight_vD, rows).unflatten(0, hidden_BSD.shape[:2])
        if per_token:
            return vocab_parallel_loss.log_probs(hidden_TD, weight_vD, targets_BS, rows, softcap=self.softcap)
        return vocab_parallel_loss.cross_entropy(hidden_TD, weight_vD, targets_BS.flatten(), rows, softcap=self.softcap)


def can_split(model: Any) -> bool:
    """Whether embedding and head are frozen and as the decoder made them: what trains must be gathered."""
    embedding, head = embedding_of(model), head_of(model)
    embedding = getattr(embedding, "base_layer", embedding)  # an adapter around it is gathered by itself
    plain = type(embedding) is nn.Embedding and type(head) is Head
    return plain and not (embedding.weight.requires_grad or head.weight.requires_grad)


def is_large(model: Any) -> bool:
    """Whether the embedding's bytes are above :data:`LARGE_BYTES`."""
    weight: Tensor = model.embedding_weight
    return weight.nbytes > LARGE_BYTES


def parallelize_vocabulary(model: Any, mesh: DeviceMesh | None) -> set[nn.Parameter]:
    """Replace embedding and head of a ``model`` on the meta device, in place, and return their parameters.

    A tied weight stays one parameter.
    """
    embedding, head = model.embedding_weight, head_of(model).weight
    split = {weight: shard_rows(weight, mesh) for weight in {embedding, head}}
    parts = part_names(model)
    place = f"{parts.embedding}.base_layer" if hasattr(embedding_of(model), "base_layer") else parts.embedding
    model.set_submodule(place, VocabParallelEmbedding(split[embedding]))
    model.set_submodule(parts.head, VocabParallelHead(split[head], head_of(model).softcap))
    return set(split.values())


def shard_rows(parameter: nn.Parameter, mesh: DeviceMesh | None) -> nn.Parameter:
    """The frozen ``parameter`` of a model on the meta device, cut by rows over the last dimension of ``mesh``."""
    if mesh is None:
        return parameter
    start, stop = rows_of_rank(parameter.shape[0], *shard_size_and_rank(mesh))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    own = parameter.detach()[start:stop].contiguous()
    sharded = DTensor.from_local(
        own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(sharded, requires_grad=False)
