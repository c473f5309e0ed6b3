"""What an adapter_config.json says of the layers that it adapts, so that PEFT adapts the same ones.

PEFT 0.19 and later reads adapters that older transformers' models of experts had, whose experts were linear layers:
in a mixture of experts it takes `gate_proj`, `w1` and the like among ``target_modules`` for the experts', wherever they
stand. A dense layer or a shared expert with these names is therefore named by its parameter, ``target_parameters``:
PEFT's tensors of it are the same.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from qsharded.lora.config import ALL_LINEAR, LoRAConfig, ends_with
from qsharded.lora.experts import LoRAExperts, adapted_parameters, has_experts
from qsharded.lora.layer import lora_layers
from qsharded.lora.targets import adaptable, peft_name

_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def written_targets(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    """Target modules and parameters, and the patterns of ranks and alphas.

    "all-linear" is written out as the layers' own names: each library understands another set by it. A name that
    adapts nothing, as an adapter that was read may have it, is not written again.
    """
    linears = [peft_name(model, name) for name, layer in lora_layers(model) if not isinstance(layer, LoRAExperts)]
    is_mixture = any(has_experts(module) for module in model.modules())
    by_parameter = [name for name in linears if is_mixture and _last(name) in _TAKEN_FOR_EXPERTS]
    by_module = [name for name in linears if name not in set(by_parameter)]
    parameters = [*(f"{name}.weight" for name in by_parameter), *_adapted_experts(model)]
    return {
        "target_modules": _modules(model, config, linears, by_module),
        "target_parameters": _endings(parameters, _all_parameters(model)) or None,
        "rank_pattern": {**config.rank_pattern, **_ranks(config, by_parameter)},
        "alpha_pattern": {**config.alpha_pattern, **_alphas(config, by_parameter)},
    }


def _modules(model: nn.Module, config: LoRAConfig, linears: list[str], named: list[str]) -> str | list[str]:
    if config.target_modules == ALL_LINEAR:
        last = sorted({_last(name) for name in named})
        # in a multimodal model other parts' layers have these names too
        is_nested = any(peft_name(model, name) != name for name, _ in lora_layers(model))
        return rf".*\.language_model\..*\.({'|'.join(last)})" if is_nested else last
    if isinstance(config.target_modules, str):
        return config.target_modules
    return [target for target in config.target_modules if any(ends_with(name, target) for name in named)]


def _adapted_experts(model: nn.Module) -> Iterator[str]:
    """The experts' parameters that have an adapter, as PEFT calls them."""
    for name, layer in lora_layers(model):
        if isinstance(layer, LoRAExperts):
            yield f"{peft_name(model, name).replace('.base_layer', '')}.{layer.parameter}"


def _all_parameters(model: nn.Module) -> set[str]:
    """What ``target_parameters`` could mean: parameters of experts, and linear layers' weights."""
    found: set[str] = set()
    for name, module in model.named_modules():
        called = peft_name(model, name).replace(".base_layer", "")
        if has_experts(module):
            found |= {f"{called}.{parameter}" for parameter in adapted_parameters(module)}
        elif adaptable(module):
            found.add(f"{called}.weight")
    return found


def _endings(names: list[str], there: set[str]) -> list[str]:
    """Endings that mean just these ``names`` of those that are there; whole names where there is none."""
    wanted, endings = set(names), set[str]()
    for name in names:
        ending = name.partition(".layers.")[2].partition(".")[2]
        fits = ending and {other for other in there if ends_with(other, ending)} <= wanted
        endings.add(ending if fits else name)
    return sorted(endings)


def _ranks(config: LoRAConfig, by_parameter: Iterable[str]) -> dict[str, int]:
    """PEFT's patterns mean the parameter's whole name, of which "gate_proj" is no ending."""
    ranks = {f"{name}.weight": config.rank(name) for name in by_parameter}
    return {name: rank for name, rank in ranks.items() if rank != config.r}


def _alphas(config: LoRAConfig, by_parameter: Iterable[str]) -> dict[str, float]:
    alphas = {f"{name}.weight": config.alpha(name) for name in by_parameter}
    return {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
