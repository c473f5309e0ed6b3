"""Low-rank adapters on linear layers, with PEFT's parameter names.

Source: Hu et al., "LoRA", arXiv:2106.09685; rsLoRA's scaling: Kalajdzievski, arXiv:2312.03732.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.nn.nf4_linear import NF4Linear
from qsharded.seeds import derived_seed

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how; the fields are PEFT's.

    Attributes:
        r: rank of the adapters.
        lora_alpha: the adapter's output is scaled by lora_alpha / r, with rsLoRA by lora_alpha / sqrt(r).
        lora_dropout: probability of zeroing an adapter's input while training.
        target_modules: "all-linear" (every linear but the output head), a list of name endings, or a regex that
            matches whole names.
        use_rslora: scale by lora_alpha / sqrt(r).
        rank_pattern, alpha_pattern: name ending or regex -> r or lora_alpha of the layers that it matches.
        modules_to_save: endings of the names of modules to train in full, kept out of quantization.
        dtype: of the trainable parameters, all of them: FSDP2 refuses mixtures.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if r < 1:
                raise ValueError(f"a LoRA rank must be at least 1, got {r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"adapters are float32 or bfloat16, got {self.dtype}")

    def rank(self, name: str) -> int:
        """The rank of the layer called ``name``."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """What the adapter's output of the layer called ``name`` is multiplied by."""
        r = self.rank(name)
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

    def is_target(self, name: str) -> bool:
        """Whether the linear layer called ``name`` gets an adapter."""
        if self.is_saved(name):
            return False
        if self.target_modules == ALL_LINEAR:
            return not _ends_with(name, "lm_head")
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(_ends_with(name, target) for target in self.target_modules)

    def is_saved(self, name: str) -> bool:
        """Whether the module called ``name``, or one that it is part of, is trained in full."""
        return any(f".{target}." in f".{name}." for target in self.modules_to_save)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of patterns: an ending of the name, or a regex of one."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


class LoRALinear(nn.Module):
    """``y = base(x) + scaling * B A dropout(x)``: a frozen linear layer and its trainable low-rank update.

    Attributes:
        base_layer: the frozen layer, [..., K] -> [..., N].
        lora_A: a linear without bias, weight [r, K].
        lora_B: a linear without bias, weight [N, r].

    The adapter's weights are cast to x's dtype for the product, so fp32 masters train a bf16 model, under FSDP2's
    mixed precision or without it. Another kind of update (DoRA) takes the place of :meth:`update`.
    """

    def __init__(
        self, base_layer: nn.Linear | NF4Linear, r: int, scaling: float, dropout: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        in_features, out_features = base_layer.in_features, base_layer.out_features
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.scaling, self.dropout = scaling, dropout
        self.lora_A = nn.Linear(in_features, r, bias=False, dtype=dtype, device=device)
        self.lora_B = nn.Linear(r, out_features, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return self.base_layer(x) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds to the base layer's output, [..., N]."""
        x = F.dropout(x, self.dropout, self.training)
        narrow = F.linear(x, self.lora_A.weight.to(x.dtype))
        return F.linear(narrow, self.lora_B.weight.to(x.dtype)) * self.scaling

    def adapters(self) -> tuple[nn.Linear, nn.Linear]:
        """(lora_A, lora_B)."""
        return self.lora_A, self.lora_B

    def delta_weight(self) -> Tensor:
        """The update as a matrix [N, K], in fp32."""
        return self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}, dropout={self.dropout:g}"


def add_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wrap the targeted linear layers of ``model`` in :class:`LoRALinear` and freeze all else, in place.

    The adapters' values are set by :func:`reset_adapters`, which this calls unless the model is on the meta device.

    Raises:
        ValueError: no layer matches ``target_modules``, or no module matches an entry of ``modules_to_save``, or one
            that does is quantized, or a chosen layer's weight is tied to another's, or the model has adapters already.
            The model is then as it was.
    """
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has adapters already; add_lora takes one without")
    targets = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | NF4Linear) and config.is_target(n)]
    if not targets:
        raise ValueError(f"no linear layer matches target_modules = {config.target_modules!r}")
    _tell_idle_patterns(config, [name for name, _ in targets])
    saved = dict(named for ending in config.modules_to_save for named in _modules_to_save(model, ending))
    _refuse_shared(model, saved, "modules_to_save cannot train")
    _refuse_shared(model, [name for name, _ in targets], "target_modules cannot adapt")
    model.requires_grad_(False)
    for name, base in targets:
        lora = LoRALinear(base, config.rank(name), config.scaling(name), config.lora_dropout, config.dtype)
        model.set_submodule(name, lora.train(base.training))
    for name, module in saved.items():
        _train_in_full(model, name, module.to(config.dtype))
    if not any(parameter.is_meta for parameter in model.parameters()):
        reset_adapters(model, seed=0)
    return model


def _tell_idle_patterns(config: LoRAConfig, names: list[str]) -> None:
    for pattern in {**config.rank_pattern, **config.alpha_pattern}:
        if not any(_matches(pattern, name) for name in names):
            logger.warning("the rank or alpha pattern %r matches no adapted layer", pattern)


def _modules_to_save(model: nn.Module, ending: str) -> Iterator[tuple[str, nn.Module]]:
    chosen = [(name, module) for name, module in model.named_modules() if _ends_with(name, ending)]
    if not chosen:
        raise ValueError(f"no module's name ends with {ending!r} (modules_to_save)")
    for name, module in chosen:
        if any(isinstance(part, NF4Linear) for part in module.modules()):
            raise ValueError(f"{name} is quantized and cannot be trained in full; leave it out of quantization")
        yield name, module


def _refuse_shared(model: nn.Module, chosen: Iterable[str], complaint: str) -> None:
    """A tied weight belongs to two modules; changed under the name of one it would be another's at the other."""
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


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def initial_A(name: str, seed: int, r: int, in_features: int) -> Tensor:
    """fp32 [r, K] on the CPU: lora_A of the layer called ``name``, uniform in +-1/sqrt(K) as PEFT draws it.

    It depends on seed and name alone: neither on the number of ranks nor on which layers came before.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, name))
    bound = 1 / math.sqrt(in_features)
    return (torch.rand(r, in_features, generator=generator) * 2 - 1) * bound


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Start every adapter of an unsharded model at no change: A random (:func:`initial_A`), B zero."""
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.weight.copy_(initial_A(name, seed, *layer.lora_A.weight.shape))
            layer.lora_B.weight.zero_()
