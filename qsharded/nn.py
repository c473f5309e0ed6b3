"""The public layers: the packed linear, its adapters, and the functions that put them into a model.

``NF4Linear`` is :class:`PackedLinear` by the name of its usual format.
"""

from qsharded.lora.config import LoRAConfig
from qsharded.lora.disabled import adapters_disabled
from qsharded.lora.layer import LoRALinear, add_lora
from qsharded.quant.convert import quantize_
from qsharded.quant.linear import PackedLinear

NF4Linear = PackedLinear

__all__ = ["LoRAConfig", "LoRALinear", "NF4Linear", "PackedLinear", "adapters_disabled", "add_lora", "quantize_"]
