"""Swap a model's linear layers for NF4 ones, in place."""

import logging
from collections.abc import Callable

from torch import nn

from qsharded import nf4
from qsharded.nn.lora import LoRALinear
from qsharded.nn.nf4_linear import NF4Linear

logger = logging.getLogger(__name__)

Filter = Callable[[str, nn.Linear], bool]


def quantize_(model: nn.Module, filter: Filter | None = None, *, double_quant: bool = True) -> nn.Module:
    """Replace the ``nn.Linear`` layers of ``model`` by :class:`NF4Linear`; on the meta device, by empty ones.

    Args:
        model: changed in place, and returned.
        filter: called with each linear's name and module, True to quantize it. By default every linear but the output
            head ("lm_head"). Adapters are left alone.
        double_quant: keep the blocks' maxima in 8 bits, or else in fp32: 4.127 or 4.5 bits a weight.

    A layer whose in_features is no multiple of 64 keeps its dtype, and a warning names it.

    Raises:
        ValueError: no layer was quantized, or a weight holds NaN or infinity.
    """
    chosen = filter or _all_but_the_head
    adapters = {part for module in model.modules() if isinstance(module, LoRALinear) for part in module.adapters()}
    candidates = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m not in adapters)
    linears = [(name, m) for name, m in candidates if chosen(name, m)]
    fitting = [(name, m) for name, m in linears if m.in_features % nf4.BLOCK == 0]
    _tell_the_others([name for name, m in linears if m.in_features % nf4.BLOCK])
    if not fitting:
        raise ValueError("no linear layer was quantized: the filter chose none whose in_features is a multiple of 64")
    for name, linear in fitting:
        model.set_submodule(name, NF4Linear.from_linear(linear, f"{name}.weight", double_quant=double_quant))
    return model


def _all_but_the_head(name: str, _: nn.Linear) -> bool:
    return name.rpartition(".")[2] != "lm_head"


def _tell_the_others(names: list[str]) -> None:
    if names:
        logger.warning("not quantized, in_features is no multiple of %d: %s", nf4.BLOCK, ", ".join(names))
