"""The values of an adapter that changes nothing yet."""

import math

import torch
from torch import Tensor

from qsharded.utils.seeds import derived_seed


def initial_A(name: str, seed: int, r: int, in_features: int) -> Tensor:
    """fp32 [r, K] on the CPU: lora_A of the layer called ``name``, uniform in +-1/sqrt(K) as PEFT draws it.

    It depends on seed and name alone: neither on the number of ranks nor on which layers came before.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, name))
    bound = 1 / math.sqrt(in_features)
    return (torch.rand(r, in_features, generator=generator) * 2 - 1) * bound
