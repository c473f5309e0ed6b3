"""The public layers: the packed linear, its adapters, and the functions that put them into a model."""

from qsharded.lora.config import LoRAConfig
from qsharded.lora.disabled import adapters_disabled
from qsharded.lora.layer import LoRALinear, add_lora
from qsharded.quant.convert import quantize_
from qsharded.quant.linear import NF4Linear

__all__ = ["LoRAConfig", "LoRALinear", "NF4Linear", "adapters_disabled", "add_lora", "quantize_"]
