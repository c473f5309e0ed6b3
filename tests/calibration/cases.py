"""Weights and inputs in which columns differ in size and go together, as those of models do."""

import torch
from torch import Tensor

from qsharded.calibration.second_moments import SecondMoments
from qsharded.quant import ops
from qsharded.quant.packed_weight import PackedWeight


def inputs(tokens: int, K: int, seed: int = 0) -> Tensor:
    """[tokens, K]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=torch.Generator().manual_seed(1)) / K**0.5
    sizes = torch.randn(K, generator=torch.Generator().manual_seed(2)).exp()
    return torch.randn(tokens, K, generator=generator) @ (mixing * sizes)


def weight(N: int, K: int, seed: int = 3) -> Tensor:
    """[N, K] in bf16."""
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.03).bfloat16()


def moments(x: Tensor) -> SecondMoments:
    """Of inputs x."""
    found = SecondMoments(x.shape[-1], x.device)
    found.add(x)
    return found


def output_error(packed: PackedWeight, original: Tensor, x: Tensor) -> float:
    """Of the layer's outputs, relative, squared."""
    difference = ops.nf4_dequantize(packed, torch.float32) - original.float()
    return ((x @ difference.T).square().sum() / (x @ original.float().T).square().sum()).item()
