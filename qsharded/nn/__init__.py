"""Layers: the packed linear, its adapters, and the functions that put them into a model."""

from qsharded.nn.lora import LoRAConfig, LoRALinear, add_lora
from qsharded.nn.nf4_linear import NF4Linear
from qsharded.nn.quantize import quantize_

__all__ = ["LoRAConfig", "LoRALinear", "NF4Linear", "add_lora", "quantize_"]
