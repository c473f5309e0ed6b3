"""What quantizing leaves as it was because it cannot be packed, told once: experts of another layout, torn rows."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qsharded.quant.experts import ExpertLinears
from qsharded.quant.packed_module import PackedModule

logger = logging.getLogger(__name__)

_SHOWN = 8


class AdaptedLayer(nn.Module):
    """A layer with a trained update beside its frozen weight; :mod:`qsharded.lora` has them."""

    def adapters(self) -> Iterable[nn.Module]:
        """The modules whose own parameters are the update; quantizing leaves them alone."""
        raise NotImplementedError


def adapters_in(model: nn.Module) -> set[nn.Module]:
    """All adapters' modules in ``model``."""
    return {part for module in model.modules() if isinstance(module, AdaptedLayer) for part in module.adapters()}


def tell(model: nn.Module, torn: Mapping[str, Any], block_size: int, total: int) -> None:
    """Warn once of the weights that stay in their dtype though nobody chose so: how many bytes, and whose.

    Args:
        model: once it is quantized.
        torn: linear layers whose rows are no whole blocks of ``block_size``, by name.
        total: bytes of the model before.
    """
    reasons = []
    if torn:
        reasons.append(f"in_features is no multiple of {block_size}: {', '.join(torn)}")
    if others := _of_other_modules(model):
        reasons.append(f"of neither linear layers nor packed experts: {_listed(others)}")
    if reasons:
        size = sum(layer.weight.nbytes for layer in torn.values()) + others.total()
        told = f"{size:,} of the model's {total:,} bytes stay in 16 or 32 bits, beside embedding and head"
        logger.warning("not quantized, %s. So %s", "; and ".join(reasons), told)


def _of_other_modules(model: nn.Module) -> Counter[str]:
    """Bytes of the matrices and larger tensors in modules that are neither linear nor embeddings, by name.

    Experts whose layout is not known are among them, and convolutions. Blocks' numbers become "*".
    """
    found: Counter[str] = Counter()
    adapters = adapters_in(model)
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | ExpertLinears | PackedModule) or module in adapters:
            continue
        if getattr(module, "is_router", False):  # stays as it is by design
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dim() >= 2 and parameter.is_floating_point():
                found[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += parameter.nbytes
    return found


def _listed(sizes: Counter[str]) -> str:
    named = ", ".join(f"{name} ({size:,})" for name, size in sizes.most_common(_SHOWN))
    return named + (f" and {len(sizes) - _SHOWN} more" if len(sizes) > _SHOWN else "")
