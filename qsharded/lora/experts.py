"""Low-rank adapters on a layer's experts, in the files and with the names of PEFT's ``target_parameters``.

transformers holds the experts of a layer in two parameters, `gate_up_proj` and `down_proj`, and PEFT adapts each by a
wrapper around the module; wrappers of both are nested. So here: an adapter of each parameter is a module around the
experts, the second around the first, and a call gathers their updates on its way in. Names, shapes and the order of
values in a file are then PEFT's without a translation.

Axes: E experts, r rank, K in_features, N out_features (of gate and up together where they are one parameter).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.lora.low_rank import LowRankLayer
from qsharded.quant.expert_mlp import Update
from qsharded.quant.grouped import ALIGNED


class LoRAExperts(LowRankLayer):
    """The experts with W_e + scaling * B_e A_e in place of each W_e of one parameter.

    There is no dropout: it would have to be drawn for each expert's input, and PEFT has none here.

    Attributes:
        base_layer: the experts, or these with the adapter of another parameter.
        parameter: which one; gate and up are one, with one A for both.
        lora_A: weight [E r, K]: an expert's r rows behind each other ("expert-major").
        lora_B: weight [N, r E]: of each r the E experts' columns behind each other ("expert-minor").
        enabled: whether the update is added; see ``adapters_disabled``.
    """

    def __init__(self, base_layer: nn.Module, parameter: str, r: int, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.parameter, self.scaling, self.enabled = base_layer, parameter, scaling, True
        self.shape = adapted_parameters(base_layer)[parameter]
        (E, N, K), device = self.shape, next(base_layer.parameters()).device
        self.lora_A = nn.Linear(K, E * r, bias=False, dtype=dtype, device=device)
        self.lora_B = nn.Linear(E * r, N, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor, *routing: Any, updates: Mapping[str, Update] | None = None) -> Tensor:
        """As the experts' own, with this one's update among theirs."""
        updates = dict(updates or {})
        if self.enabled:
            updates[self.parameter] = self.update(x.dtype)
        made: Tensor = self.base_layer(x, *routing, updates=updates)
        return made

    def update(self, dtype: torch.dtype) -> Update:
        """In ``dtype``; in 16 bits the rank is filled up with zeros, to rows that grouped products take."""
        A_ErK, B_ENr = self.by_expert(self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype))
        if dtype != torch.float32 and (short := -A_ErK.shape[1] % ALIGNED):
            A_ErK, B_ENr = F.pad(A_ErK, (0, 0, 0, short)), F.pad(B_ENr, (0, short))
        return Update(A_ErK, B_ENr.contiguous(), self.scaling)

    def by_expert(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """[E, r, K] and [E, N, r] of the tensors as they are stored."""
        E = self.shape[0]
        return A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The update [E, N, K] in fp32 that A and B make."""
        A_ErK, B_ENr = self.by_expert(A.float(), B.float())
        return B_ENr @ A_ErK * self.scaling

    def extra_repr(self) -> str:
        return f"parameter={self.parameter}, scaling={self.scaling:g}"


def adapted_parameters(experts: Any) -> dict[str, tuple[int, int, int]]:
    """(E, N, K) of each parameter of the experts, under the adapters that they have."""
    while isinstance(experts, LoRAExperts):
        experts = experts.base_layer
    shapes: dict[str, tuple[int, int, int]] = experts.parameter_shapes()
    return shapes


def has_experts(module: nn.Module) -> bool:
    """Whether adapters of this kind go on it."""
    return hasattr(module, "parameter_shapes")
