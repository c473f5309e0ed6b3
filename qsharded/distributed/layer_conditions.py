"""Under what a layer is compared with its twin: its bytes known, its adapters at work, and no dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.lora.experts import LoRAExperts
from qsharded.lora.layer import LoRALinear
from qsharded.quant.experts import PackedExperts
from qsharded.quant.linear import PackedLinear
from qsharded.utils.sharding import gathered_rows, local, own_rows


def unsharded(tensor: Tensor, device: torch.device) -> Tensor:
    """All rows of a tensor, gathered as bytes by no means of FSDP2's. Every rank calls this."""
    own = local(tensor).detach().to(device)
    rows = own_rows(tensor) if own.dim() else None
    return own if rows is None or rows.group is None else gathered_rows(own, rows.total, rows.group)


@contextmanager
def bytes_compared(layer: nn.Module, whole: dict[str, Tensor]) -> Iterator[set[str]]:
    """The names of packed layers that meanwhile computed with other bytes than those of ``whole``."""
    changed: set[str] = set()
    packed = {
        name: module for name, module in layer.named_modules() if isinstance(module, PackedLinear | PackedExperts)
    }
    for name, module in packed.items():
        module.packed = partial(_compared, module, name, whole, changed)  # type: ignore[method-assign]
    try:
        yield changed
    finally:
        for module in packed.values():
            del module.packed


def _compared(module: PackedLinear | PackedExperts, name: str, whole: dict[str, Tensor], changed: set[str]) -> Any:
    for part in ("weight", "weight_absmax"):
        seen, held = module.get_parameter(part).detach(), whole[f"{name}.{part}"]
        if not torch.equal(seen.view(torch.uint8), held.view(torch.uint8)):
            changed.add(name)
    return type(module).packed(module)  # type: ignore[arg-type]  # of its own class


@contextmanager
def evaluating(layer: nn.Module) -> Iterator[None]:
    """Without dropout."""
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def adapters_at_work(layer: nn.Module) -> Iterator[None]:
    """Adapters that begin at no change would hide themselves: their B gets values about as large as the layer's
    weights, and then its own back."""
    before: list[tuple[Tensor, Tensor]] = []
    for module in layer.modules():
        if isinstance(module, LoRALinear | LoRAExperts):
            before.append((local(module.lora_B.weight).detach(), local(module.lora_B.weight).detach().clone()))
            _fill(module)
    try:
        yield
    finally:
        for own, values in before:
            own.copy_(values)


@torch.no_grad()
def _fill(module: LoRALinear | LoRAExperts) -> None:
    weight = module.lora_B.weight
    rows, R = own_rows(weight), weight.shape[1]
    numbers = torch.arange(rows.start * R, rows.stop * R, device=local(weight).device, dtype=torch.float32)
    local(weight).copy_(numbers.cos_().view(-1, R).mul_(0.7 / (module.scaling * R**0.5)))
