"""What adapters of two linear layers, A and B, have in common."""

import math

import torch
from torch import Tensor, nn

from qsharded.quant.unquantized import AdaptedLayer
from qsharded.utils.seeds import derived_seed


class LowRankLayer(AdaptedLayer):
    """A layer with a trained update B A beside its frozen weight.

    Attributes:
        lora_A, lora_B: linears without bias.
    """

    lora_A: nn.Linear
    lora_B: nn.Linear

    def adapters(self) -> tuple[nn.Linear, nn.Linear]:
        """(lora_A, lora_B)."""
        return self.lora_A, self.lora_B

    def updates(self) -> dict[str, Tensor]:
        """What trains, by its name in this layer."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def initial(self, name: str, seed: int) -> tuple[Tensor, Tensor]:
        """The values, in fp32 on the CPU, of :meth:`updates` at no change, for the layer called ``name``."""
        return initial_A(name, seed, *self.lora_A.weight.shape), torch.zeros(self.lora_B.weight.shape)


def initial_A(name: str, seed: int, r: int, in_features: int) -> Tensor:
    """fp32 [r, K] on the CPU: lora_A of the layer called ``name``, uniform in +-1/sqrt(K) as PEFT draws it.

    It depends on seed and name alone: neither on the number of ranks nor on which layers came before.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, name))
    bound = 1 / math.sqrt(in_features)
    return (torch.rand(r, in_features, generator=generator) * 2 - 1) * bound
