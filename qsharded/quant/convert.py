"""Swap a model's linear layers, and its experts, for NF4 ones, in place."""

from collections.abc import Callable
from typing import Any

from torch import nn

from qsharded.quant import formats, unquantized
from qsharded.quant.experts import ExpertLinears, PackedExperts
from qsharded.quant.fused_experts import SplitExperts, is_known, mark_router, put_in_place
from qsharded.quant.linear import PackedLinear
from qsharded.utils.argument_kinds import refuse_other_kind

_LINEAR = nn.Linear | ExpertLinears

Filter = Callable[[str, Any], bool]
"""From the name and the module of a linear layer, or of one projection of a layer's experts, whether to quantize it."""


def quantize_(
    model: nn.Module,
    filter: Filter | None = None,
    *,
    quant_type: str = "nf4",
    block_size: int = formats.BLOCK,
    double_quant: bool = True,
) -> nn.Module:
    """Replace the ``nn.Linear`` layers of ``model`` by :class:`PackedLinear`, and the :class:`ExpertLinears` of our own
    models by :class:`PackedExperts`; on the meta device, by empty ones. Experts of transformers 5, in two tensors a
    layer, become :class:`SplitExperts` of :class:`PackedExperts` where their layout is known.

    Args:
        model: changed in place, and returned.
        filter: called with each linear's name and module, True to quantize it; for experts with each of their
            projections ("mlp.experts.gate_proj"), which transformers' are quantized all or none. By default every
            linear but the output head ("lm_head"). Adapters are left alone.
        quant_type: "nf4", or bitsandbytes' "fp4".
        block_size: weights that share an absmax: 32, 64, 128 and so on to 4096. The fast kernels are for blocks of 64.
        double_quant: keep the blocks' maxima in 8 bits, or else in fp32: 4.127 or 4.5 bits a weight.

    A layer whose in_features is no multiple of the block size keeps its dtype, and so do weights that are no linear
    layer's, as experts in another layout. One warning names them, with their bytes and the model's.

    Raises:
        ValueError: ``model`` is a linear layer itself or no module, ``filter`` is no function, no layer was quantized,
            a weight holds NaN or infinity, or there is no such format.
    """
    _refuse_what_is_no_model(model)
    if filter is not None:
        refuse_other_kind(filter, Callable, "filter", "a function of a layer's name and module")
    quant_format = formats.QuantFormat(quant_type, block_size)
    block_size = quant_format.block_size
    chosen = filter or _all_but_the_head
    adapters = unquantized.adapters_in(model)
    experts_of = _known_experts(model)
    stays = adapters | {module for module in model.modules() if getattr(module, "is_router", False)}
    candidates = ((name, m) for name, m in model.named_modules() if isinstance(m, _LINEAR) and m not in stays)
    linears = [(name, m) for name, m in candidates if chosen(name, m)]
    fitting = [(name, m) for name, m in linears if m.in_features % block_size == 0]
    total = sum(parameter.nbytes for parameter in model.parameters())
    torn = {name: m for name, m in linears if m.in_features % block_size}
    fused = [(name, experts) for name, experts in experts_of if _all_chosen(name, experts, chosen, block_size)]
    if not fitting and not fused:
        raise ValueError(
            f"no linear layer was quantized: the filter chose none whose in_features is a multiple of {block_size}"
        )
    for name, linear in fitting:
        model.set_submodule(name, _packed(linear, f"{name}.weight", quant_format, double_quant))
    for name, experts in fused:
        for part, linears_of_part in experts.linears().items():
            weight = f"{name}.{part}.weight"
            experts.set_submodule(part, _packed(linears_of_part, weight, quant_format, double_quant))
        put_in_place(model, name, experts)
    unquantized.tell(model, torn, block_size, total)
    return model


def _known_experts(model: nn.Module) -> list[tuple[str, SplitExperts]]:
    """transformers' experts, taken apart; their routers are marked."""
    known = [(name, SplitExperts(module)) for name, module in model.named_modules() if is_known(module)]
    for name, experts in known:
        mark_router(model, name, experts)
    return known


def _all_chosen(name: str, experts: SplitExperts, chosen: Filter, block_size: int) -> bool:
    """Whether every projection is chosen and can be packed."""
    return all(
        linears.in_features % block_size == 0 and chosen(f"{name}.{part}", linears)
        for part, linears in experts.linears().items()
    )


def _packed(layer: Any, name: str, quant_format: formats.QuantFormat, double_quant: bool) -> nn.Module:
    if isinstance(layer, ExpertLinears):
        return PackedExperts.from_experts(layer, name, quant_format=quant_format, double_quant=double_quant)
    quant_type, block_size = quant_format.quant_type, quant_format.block_size
    return PackedLinear.from_linear(
        layer, name, quant_type=quant_type, block_size=block_size, double_quant=double_quant
    )


def _refuse_what_is_no_model(model: nn.Module) -> None:
    refuse_other_kind(model, nn.Module, "model", "an nn.Module")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "quantize_ replaces the linear layers inside a model, and this is a linear layer itself: "
            "qsharded.nn.PackedLinear.from_linear(layer) makes a packed one of it"
        )


def _all_but_the_head(name: str, _: nn.Module) -> bool:
    return name.rpartition(".")[2] != "lm_head"
