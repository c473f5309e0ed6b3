"""Which layers an adapter's configuration chooses, and the refusal of entries that choose none.

A name that matches nothing would be trained by nobody and written all the same: a misspelling has to be told.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from qsharded.lora.config import ALL_LINEAR, LoRAConfig, ends_with, matches_pattern
from qsharded.lora.experts import adapted_parameters, has_experts
from qsharded.quant.experts import ExpertLinears
from qsharded.quant.linear import PackedLinear
from qsharded.quant.packed_module import PackedModule


def adaptable(module: nn.Module) -> bool:
    """Whether there is an adapter for layers of this type. A subclass of nn.Embedding may compute something else; a
    linear layer that does, or whose weight others read too, is marked by whoever knows."""
    if not getattr(module, "is_adaptable", True):
        return False
    return isinstance(module, nn.Linear | PackedLinear) or type(module) is nn.Embedding


def peft_name(model: nn.Module, name: str) -> str:
    """What PEFT calls what ``model`` calls ``name``; a model says so where it is not the same (``adapter_name``)."""
    rename = getattr(model, "adapter_name", None)
    return name if rename is None else str(rename(name))


def targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The layers of ``model`` that get an adapter, by name.

    Raises:
        ValueError: an entry of ``target_modules`` or of a pattern that matches no such layer, or one of
            ``target_modules`` that also matches a module which cannot have an adapter, as PEFT refuses it. Neither is
            raised where ``config`` is not strict.
    """
    layers = {name: module for name, module in model.named_modules() if adaptable(module)}
    called = {name: peft_name(model, name) for name in layers}
    if config.strict:
        _refuse_idle_targets(config, {called[n]: layer for n, layer in layers.items() if _may_mean(config, layer)})
        _refuse_other_modules(model, config)
    chosen = {
        n: layer
        for n, layer in layers.items()
        if (config.is_target(called[n]) and _may_mean(config, layer))
        or (config.is_target_parameter(f"{called[n]}.weight") and not isinstance(layer, nn.Embedding))
    }
    if config.strict:
        experts = {name for parts in _expert_parameters(model).values() for name in parts.values()}
        adapted = {*(called[name] for name in chosen), *filter(config.adapts_experts, experts)}
        _refuse_idle_patterns(config, adapted)
    return chosen


def expert_targets(model: nn.Module, config: LoRAConfig) -> dict[str, list[str]]:
    """The experts of ``model`` of which a parameter gets an adapter, by name, with those parameters in their order.

    Raises:
        ValueError: an entry of ``target_parameters`` that matches nothing that can be adapted (unless ``config`` is not
            strict), or dropout.
    """
    called = _expert_parameters(model)
    if config.strict:
        linears = [f"{peft_name(model, n)}.weight" for n, m in model.named_modules() if adaptable(m)]
        _refuse_idle_parameters(config, [*linears, *(name for parts in called.values() for name in parts.values())])
    chosen = {
        name: [part for part, full in parts.items() if config.adapts_experts(full)] for name, parts in called.items()
    }
    chosen = {name: parts for name, parts in chosen.items() if parts}
    if chosen and config.lora_dropout:
        raise ValueError(
            f"lora_dropout = {config.lora_dropout:g}: adapters on experts ({next(iter(chosen))}) have no dropout, in "
            "PEFT neither; set it to 0, or name target_modules without the experts"
        )
    return chosen


def _expert_parameters(model: nn.Module) -> dict[str, dict[str, str]]:
    """name of experts -> their parameters -> what PEFT calls these."""
    return {
        name: {part: f"{peft_name(model, name)}.{part}" for part in adapted_parameters(module)}
        for name, module in model.named_modules()
        if has_experts(module)
    }


def _refuse_idle_parameters(config: LoRAConfig, parameters: list[str]) -> None:
    for entry in config.target_parameters:
        if not any(ends_with(name, entry) for name in parameters):
            raise ValueError(
                f"no parameter matches target_parameters = {entry!r}; there are {_listed(parameters)} of experts and "
                "linear layers"
            )


def modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules of ``model`` that are trained in full, by name.

    Raises:
        ValueError: an entry that matches none (unless ``config`` is not strict), one that is quantized, or experts.
    """
    modules = dict(model.named_modules())
    chosen: dict[str, nn.Module] = {}
    for ending in config.modules_to_save:
        found = {name: module for name, module in modules.items() if ends_with(name, ending)}
        if not found and config.strict:
            raise ValueError(
                f"no module's name ends with {ending!r} (modules_to_save); there are {_listed(filter(None, modules))}"
            )
        chosen |= found
    for name, module in chosen.items():
        if any(isinstance(part, ExpertLinears) for part in module.modules()):
            raise ValueError(
                f"{name} has experts, whose matrices stay frozen: modules_to_save cannot train it; adapt the experts, "
                "with target_parameters or all-linear"
            )
        if any(isinstance(part, PackedModule) for part in module.modules()):
            raise ValueError(f"{name} is quantized and cannot be trained in full; leave it out of quantization")
    return chosen


def _may_mean(config: LoRAConfig, layer: nn.Module) -> bool:
    return config.target_modules != ALL_LINEAR or not (
        isinstance(layer, nn.Embedding) or getattr(layer, "is_head", False)
    )


def _entries(config: LoRAConfig) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """(entry of target_modules, whether it matches a name)."""
    if isinstance(config.target_modules, str):
        yield config.target_modules, config.matches
    else:
        for target in config.target_modules:
            yield target, lambda name, target=target: ends_with(name, target)  # type: ignore[misc]


def _refuse_idle_targets(config: LoRAConfig, layers: Mapping[str, nn.Module]) -> None:
    idle = [entry for entry, matches in _entries(config) if not any(map(matches, layers))]
    if idle or not (config.target_modules or config.target_parameters):
        said = config.target_modules if isinstance(config.target_modules, str) else idle
        raise ValueError(f"no linear layer matches target_modules = {said!r}{_there_are(layers)}")


def _there_are(layers: Mapping[str, nn.Module]) -> str:
    embeddings = [name for name, layer in layers.items() if isinstance(layer, nn.Embedding)]
    also = f", and the embedding {_listed(embeddings)}" if embeddings else ""
    return f"; there are {_listed(layers.keys() - set(embeddings))}{also}"


def _refuse_other_modules(model: nn.Module, config: LoRAConfig) -> None:
    if config.target_modules == ALL_LINEAR:
        return
    for name, module in model.named_modules():
        # an Identity stands where other libraries' models of this kind have no module
        if (
            name
            and not adaptable(module)
            and not isinstance(module, nn.Identity)
            and config.is_target(peft_name(model, name))
        ):
            raise ValueError(
                f"target_modules = {config.target_modules!r} matches {name}, which is no linear layer and no embedding "
                f"but {type(module).__name__}; PEFT refuses it too: name the layers in it"
            )


def _refuse_idle_patterns(config: LoRAConfig, chosen: Iterable[str]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(matches_pattern(pattern, name) for name in chosen):
                raise ValueError(f"{option}: {pattern!r} matches no adapted layer; adapted are {_listed(chosen)}")


def _listed(names: Iterable[str]) -> str:
    """The last parts of the names, those of numbered layers left out."""
    last = {name.rpartition(".")[2] for name in names}
    return ", ".join(sorted(part for part in last if not part.isdecimal()) or sorted(last)) or "none"
