"""A decoder whose base is packed already: what its linear layers and experts decode to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qsharded.calibration.layer_walk import LayerWalk
from qsharded.checkpoint import fill_shards
from qsharded.checkpoint.expert_fills import packed_experts_in
from qsharded.checkpoint.load import checkpoint_name, packed_expert_fills, packed_layer_fills
from qsharded.checkpoint.packed_format import PackedCheckpoint
from qsharded.checkpoint.row_chunks import WeightSource
from qsharded.models import CausalLM
from qsharded.quant.experts import PackedExperts, PackedExpertWeights
from qsharded.quant.linear import PackedLinear


class PackedBaseWalk(LayerWalk):
    """One whose experts compute as those of a packed checkpoint, however they were rounded.

    Args:
        experts: those that are packed, on the meta device, by the names of their weights.
    """

    def __init__(
        self,
        model: CausalLM,
        source: WeightSource,
        ids_RS: Tensor,
        device: torch.device,
        packed: PackedCheckpoint,
        experts: Mapping[str, PackedExperts],
    ) -> None:
        super().__init__(model, source, ids_RS, device)
        self._packed, self._experts = packed, experts

    @contextmanager
    def in_memory(self, layer: int) -> Iterator[nn.Module]:
        """As :class:`LayerWalk` says."""
        with super().in_memory(layer) as module:
            for name, experts in self.expert_linears(layer).items():
                if name in self._experts:
                    experts.hold_(_stored_experts(self._packed, name, self._experts[name], self._device))
            yield module


def packed_experts(model: nn.Module) -> dict[str, PackedExperts]:
    """Those of a model, by what a checkpoint calls their weights."""
    return {checkpoint_name(f"{name}.weight"): experts for name, experts in packed_experts_in(model)}


def _stored_experts(
    packed: PackedCheckpoint, name: str, like: PackedExperts, device: torch.device
) -> PackedExpertWeights:
    sizes = like.experts, like.in_features, like.out_features
    experts = PackedExperts(*sizes, quant_format=like.quant_format, device=device)
    fill_shards.run(packed_expert_fills(packed, name.removesuffix(".weight"), experts), packed.source, device)
    return experts.packed()


def decoded(packed: PackedCheckpoint, name: str, like: PackedLinear, device: torch.device) -> Tensor:
    """fp32 [N, K], of a packed weight in a checkpoint's files."""
    layer = PackedLinear(
        like.in_features,
        like.out_features,
        bias=False,
        quant_type=like.quant_type,
        block_size=like.block_size,
        double_quant=like.weight_absmax_scales is not None,
        device=device,
    )
    fill_shards.run(packed_layer_fills(packed, name, layer), packed.source, device)
    return layer.dequantize(torch.float32)
