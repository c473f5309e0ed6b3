"""Low-rank adapters on a model's layers, with PEFT's parameter names.

Source: Hu et al., "LoRA", arXiv:2106.09685; rsLoRA's scaling: Kalajdzievski, arXiv:2312.03732.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.lora.config import LoRAConfig
from qsharded.lora.embedding import LoRAEmbedding
from qsharded.lora.experts import LoRAExperts
from qsharded.lora.low_rank import LowRankLayer
from qsharded.lora.targets import expert_targets, modules_to_save, peft_name, targets
from qsharded.quant.linear import PackedLinear
from qsharded.utils.argument_kinds import refuse_other_kind
from qsharded.utils.sharding import local, own_rows


class LoRALinear(LowRankLayer):
    """``y = base(x) + scaling * B A dropout(x)``: a frozen linear layer and its trainable low-rank update.

    Attributes:
        base_layer: the frozen layer, [..., K] -> [..., N].
        lora_A: a linear without bias, weight [r, K].
        lora_B: a linear without bias, weight [N, r].
        enabled: whether the update is added; see ``adapters_disabled``.

    The adapter's weights are cast to x's dtype for the product, so fp32 masters train a bf16 model, under FSDP2's
    mixed precision or without it. A subclass whose output is no sum of the two, as DoRA's is not, overrides
    :meth:`adapt`.
    """

    def __init__(
        self, base_layer: nn.Linear | PackedLinear, r: int, scaling: float, dropout: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        in_features, out_features = base_layer.in_features, base_layer.out_features
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.scaling, self.dropout, self.enabled = scaling, dropout, True
        self.lora_A = nn.Linear(in_features, r, bias=False, dtype=dtype, device=device)
        self.lora_B = nn.Linear(r, out_features, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        base_output = self.base_layer(x)
        return self.adapt(x, base_output) if self.enabled else base_output

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        """The layer's output, [..., N], from its input and the base layer's output."""
        return base_output + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the base layer's output, [..., N]."""
        x = F.dropout(x, self.dropout, self.training)
        narrow = F.linear(x, self.lora_A.weight.to(x.dtype))
        return F.linear(narrow, self.lora_B.weight.to(x.dtype)) * self.scaling

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The update [N, K] in fp32 that A and B make."""
        return B.float() @ A.float() * self.scaling

    def delta_weight(self) -> Tensor:
        """The update as a matrix [N, K], in fp32."""
        return self.product(self.lora_A.weight, self.lora_B.weight)

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}, dropout={self.dropout:g}"


LoRALayer = LoRALinear | LoRAEmbedding | LoRAExperts
"""A layer with its adapter."""


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wrap the targeted layers of ``model`` in :class:`LoRALinear` or :class:`LoRAEmbedding` and freeze all else, in
    place.

    The adapters' values are set by :func:`reset_adapters`, which this calls unless the model is on the meta device.

    Raises:
        ValueError: an entry of ``target_modules``, of the patterns or of ``modules_to_save`` matches nothing, or
            something that cannot be adapted, or a module to save is quantized or tied to another (an adapted layer may
            be: the other keeps the frozen weight), or the model has adapters already. The model is then as it was.
            An argument of another kind.
    """
    refuse_other_kind(model, nn.Module, "model", "an nn.Module")
    refuse_other_kind(config, LoRAConfig, "config", "a LoRAConfig")
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already; add_lora takes one without")
    chosen, saved, experts = targets(model, config), modules_to_save(model, config), expert_targets(model, config)
    _refuse_shared(model, saved, "modules_to_save cannot train")
    model.requires_grad_(False)
    for name, base in chosen.items():
        model.set_submodule(name, _adapted(peft_name(model, name), base, config).train(base.training))
    for name, parameters in experts.items():
        model.set_submodule(name, _adapted_experts(model, name, parameters, config))
    for name, module in saved.items():
        _train_in_full(model, name, module.to(config.dtype))
    if not any(parameter.is_meta for parameter in model.parameters()):
        reset_adapters(model, seed=0)
    return model


def _adapted(name: str, base: Any, config: LoRAConfig) -> LoRALayer:
    r, scaling = config.rank(name), config.scaling(name)
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding(base, r, scaling, config.dtype)
    return LoRALinear(base, r, scaling, config.lora_dropout, config.dtype)


def _adapted_experts(model: nn.Module, name: str, parameters: list[str], config: LoRAConfig) -> nn.Module:
    experts = model.get_submodule(name)
    training = experts.training
    for parameter in parameters:
        called = f"{peft_name(model, name)}.{parameter}"
        experts = LoRAExperts(experts, parameter, config.rank(called), config.scaling(called), config.dtype)
    return experts.train(training)


def _refuse_shared(model: nn.Module, chosen: Iterable[str], complaint: str) -> None:
    """A tied weight belongs to two modules; changed under the name of one it would be another's at the other. An update
    beside it changes neither."""
    owners: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(parameter, name)
        if first != name and any(f".{module}." in f".{first}.{name}." for module in chosen):
            raise ValueError(f"{first} and {name} are one tied weight, which {complaint}; leave it out")


def _train_in_full(model: nn.Module, name: str, module: nn.Module) -> None:
    module.requires_grad_(True)
    for part_name, part in list(module.named_modules(prefix=name)):
        if type(part) is nn.Linear:
            model.set_submodule(part_name, MasterLinear.around(part))


class MasterLinear(nn.Linear):
    """A linear layer trained in full, whose weights may be wider than the activations and are cast for the product."""

    @classmethod
    def around(cls, linear: nn.Linear) -> "MasterLinear":
        """One that takes over the parameters of ``linear``."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


@torch.no_grad()
def reset_adapters(model: nn.Module, seed: int) -> None:
    """Start every adapter at no change: A random (:func:`initial_A`) and B zero, or an embedding's the other way round.

    A sharded model's ranks fill their rows.
    """
    for name, layer in lora_layers(model):
        for parameter, values in zip(layer.updates().values(), layer.initial(name, seed), strict=True):
            rows = own_rows(parameter)
            local(parameter).copy_(values[rows.start : rows.stop])
