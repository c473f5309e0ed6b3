"""The MLP of a decoder layer, under the module names of Hugging Face's checkpoints. Axes: B batch, S sequence,
D hidden size."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.config import ModelConfig


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": _relu2,
}


def make_mlp(config: ModelConfig) -> "MLP | UngatedMLP":
    """The MLP that ``config`` describes."""
    kinds: dict[str, type[MLP | UngatedMLP]] = {"gated": MLP, "fused": FusedMLP, "ungated": UngatedMLP}
    return kinds[config.mlp](config)


class MLP(nn.Module):
    """A gated MLP, with silu SwiGLU (https://arxiv.org/abs/2002.05202): down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self._make_projections(config)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def _make_projections(self, config: ModelConfig) -> None:
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def input_projections(self) -> tuple[nn.Module, ...]:
        """The layers that read the MLP's input; side by side their outputs are gate and up."""
        return self.gate_proj, self.up_proj

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down_proj(self.activation(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class FusedMLP(MLP):
    """Gate and up from one linear layer, ``gate_up_proj``: Phi-3's and GLM-4's."""

    def _make_projections(self, config: ModelConfig) -> None:
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)

    def input_projections(self) -> tuple[nn.Module, ...]:
        """``gate_up_proj`` alone."""
        return (self.gate_up_proj,)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        gate, up = self.gate_up_proj(x_BSD).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)


class UngatedMLP(nn.Module):
    """down(act(up(x))): Arcee's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def input_projections(self) -> tuple[nn.Module, ...]:
        """``up_proj`` alone."""
        return (self.up_proj,)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down_proj(self.activation(self.up_proj(x_BSD)))
