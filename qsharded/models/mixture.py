"""A mixture of experts in place of a layer's MLP, under the module names of Hugging Face's checkpoints.

A router chooses k of E experts for each token, and weighs them; the experts' outputs, so weighted, are added. Each
projection of all experts is one module, in 16 bits :class:`ExpertLinears`; how they are computed is in
:mod:`qsharded.quant.expert_product`. Some families add an expert that every token gets ("shared").

Axes: B batch, S sequence, M = B S tokens, D hidden size, J intermediate size of an expert, E experts, k of a token.
"""

from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from qsharded.models.config import ModelConfig
from qsharded.models.layer_shapes import ExpertMixture
from qsharded.models.mlp import ACTIVATIONS, MLP
from qsharded.models.routers import ROUTERS, Choice
from qsharded.quant.expert_rows import Glu, silu_product
from qsharded.quant.experts import ExpertLinears
from qsharded.quant.gated_experts import GatedExperts
from qsharded.quant.routing import Routed


class Tally(Protocol):
    """Who counts what routers choose; :mod:`qsharded.models.balance` does."""

    def add(self, logits_ME: Tensor, chosen_Mk: Tensor, is_routed_M: Tensor | None) -> None:
        """Of the tokens of one layer."""


class MixtureMLP(nn.Module):
    """Router, experts and, where a family has it, the expert that every token gets."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mixture = _mixture_of(config)
        self.count = mixture.experts
        self.router_name, self.shared_name = ("router" if mixture.clamped else "gate"), mixture.shared_name
        self.add_module(self.router_name, ROUTERS[mixture.router](config.hidden_size, mixture))
        self.experts = Experts(config)
        if mixture.shared_size:
            self.add_module(self.shared_name, MLP(replace(config, intermediate_size=mixture.shared_size)))
        self.tally: Tally | None = None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if mixture.shared_gate else None

    def forward(self, x_BSD: Tensor, is_routed_BS: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]. Where ``is_routed_BS`` is False no expert is asked."""
        x_MD = x_BSD.flatten(0, 1)
        choice: Choice = self.get_submodule(self.router_name)(x_MD)
        is_routed_M = None if is_routed_BS is None else is_routed_BS.expand(x_BSD.shape[:2]).flatten()
        if self.tally is not None:
            self.tally.add(choice.logits_ME, choice.experts_Mk, is_routed_M)
        y_MD = self.experts(x_MD, choice.scores_Mk, Routed.of(choice.experts_Mk, self.count, is_routed_M))
        return (y_MD + shared_MD if (shared_MD := self._shared(x_MD)) is not None else y_MD).view_as(x_BSD)

    def _shared(self, x_MD: Tensor) -> Tensor | None:
        shared = getattr(self, self.shared_name, None)
        if shared is None:
            return None
        y_MD: Tensor = shared(x_MD)
        return y_MD if self.shared_expert_gate is None else y_MD * self.shared_expert_gate(x_MD).sigmoid()


class Experts(GatedExperts):
    """The gated MLPs of all experts: gate and up [E, J, D], down [E, D, J]."""

    def __init__(self, config: ModelConfig) -> None:
        mixture, D = _mixture_of(config), config.hidden_size
        E, J, has_bias = mixture.experts, mixture.intermediate_size, mixture.clamped
        gate, up, down = (ExpertLinears(E, *sizes, has_bias) for sizes in ((D, J), (D, J), (J, D)))
        super().__init__(gate, up, down, glu=_glu(config, mixture), interleaved=mixture.clamped)


def _mixture_of(config: ModelConfig) -> ExpertMixture:
    assert config.mixture is not None
    return config.mixture


def _glu(config: ModelConfig, mixture: ExpertMixture) -> Glu:
    if mixture.clamped:
        return partial(_clamped_glu, mixture.clamp_limit, mixture.clamp_gain)
    return silu_product if config.activation == "silu" else partial(_gated, config.activation)


def _gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


def _clamped_glu(limit: float, gain: float, gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's: (up + 1) gate sigmoid(gain gate), of clamped gate and up."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * gain))
