"""transformers' experts: a layer's in two tensors of three dimensions, taken apart into projections that can be packed.

Classes of experts say there how their tensors lie and how gate and up make what the down projection takes
(transformers' ``use_experts_implementation``). That is what is read here, by those attributes and the tensors' shapes:
no family is known by name, and transformers is not imported. Two layouts are known:

    joined    gate_up_proj [E, 2J, D], gate's rows before up's; down_proj [E, D, J]
    gpt-oss   gate_up_proj [E, D, 2J], gate and up in alternate columns; down_proj [E, J, D]; biases gate_up_proj_bias
              [E, 2J], gate and up in turn, and down_proj_bias [E, D]

Axes: M tokens, k experts of a token, E experts, J intermediate size, D hidden size.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsharded.quant.expert_rows import Glu, silu_product
from qsharded.quant.experts import DOWN, GATE_UP, ExpertLinears
from qsharded.quant.formats import FLOAT_DTYPES
from qsharded.quant.gated_experts import GatedExperts
from qsharded.quant.routing import Routed

_LAYOUT = "is_transposed", "is_concatenated", "has_bias"
_JOINED, _GPT_OSS = (False, True, False), (True, False, True)
_DEFAULT_GATE = "_default_apply_gate"  # act_fn(gate) * up
_SILU = "SiLU", "SiLUActivation"  # PyTorch's and transformers' class; kernels know the product with it


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` holds experts in a layout that :class:`SplitExperts` takes apart."""
    layout = tuple(getattr(module, name, None) for name in _LAYOUT)
    gated = getattr(module, "has_gate", False) is True and callable(getattr(module, "_apply_gate", None))
    if layout not in (_JOINED, _GPT_OSS) or not gated or getattr(module, "has_post_expert_norm", False):
        return False
    found = {name: tuple(p.shape) for name, p in module.named_parameters() if p.dtype in FLOAT_DTYPES}
    down = found.get(DOWN, ())
    return len(down) == 3 and not list(module.buffers()) and found == _shapes(layout == _GPT_OSS, *down)


def _shapes(turned: bool, E: int, N: int, K: int) -> dict[str, tuple[int, ...]]:
    """Of all parameters, by what the down projection has."""
    if not turned:
        return {GATE_UP: (E, 2 * K, N), DOWN: (E, N, K)}
    biases: dict[str, tuple[int, ...]] = {f"{GATE_UP}_bias": (E, 2 * N), f"{DOWN}_bias": (E, K)}
    return {GATE_UP: (E, K, 2 * N), DOWN: (E, N, K)} | biases


class SplitExperts(GatedExperts):
    """The experts of a module that :func:`is_known`, called as that is. Their matrices are views of its tensors.

    Args:
        theirs: stays as it is.
    """

    def __init__(self, theirs: Any) -> None:
        turned = bool(theirs.is_transposed)
        (gate_up, bias), down = (_matrices(theirs, name, turned) for name in (GATE_UP, DOWN))
        biases = (None, None) if bias is None else halves_of(bias, turned)
        parts = *zip(halves_of(gate_up, turned), biases, strict=True), down
        super().__init__(*(_linears(*part) for part in parts), glu=_glu(theirs), interleaved=turned)
        self.train(theirs.training)

    def routing(self, x: Tensor, *routing: Any) -> tuple[Tensor, Tensor, Routed]:
        """Of tokens [.., D], the experts [.., k] that each is routed to, int64 and E for none, and their scores."""
        (experts, scores), x_MD = routing, x.flatten(0, -2)
        routed = Routed.of(experts.reshape(len(x_MD), -1), self.gate_proj.experts)
        return x_MD, scores.reshape(len(x_MD), -1), routed

    def linears(self) -> dict[str, ExpertLinears]:
        """The projections by name."""
        return {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that transformers has in their place, by name."""
        down = self.down_proj
        sizes = (down.in_features, down.out_features) if self.interleaved else (down.out_features, down.in_features)
        return _shapes(self.interleaved, down.experts, *sizes)

    def own_tensors(self) -> "SplitExperts":
        """The same with tensors of its own in place of views, as FSDP2 and the loader want them."""
        for linears in self.linears().values():
            for name, parameter in list(linears.named_parameters()):
                own = nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format), False)
                linears.register_parameter(name, own)
        return self


def put_in_place(model: nn.Module, name: str, experts: SplitExperts) -> None:
    """As the module ``name`` of ``model``; the router beside it is marked as what stays as it is by design."""
    mark_router(model, name, experts)
    model.set_submodule(name, experts)


def mark_router(model: nn.Module, name: str, experts: SplitExperts) -> None:
    """What beside the experts ``name`` has one matrix, [E, D], by itself or in a module below."""
    of_router = experts.gate_proj.experts, experts.gate_proj.in_features
    beside, own = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
    for sibling in beside.children():
        holders = [m for m in sibling.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
        if sibling is not own and len(holders) == 1 and _has_matrix(holders[0], of_router):
            holders[0].is_router = True  # type: ignore[assignment]
            holders[0].is_adaptable = False  # type: ignore[assignment]


def _has_matrix(module: nn.Module, shape: tuple[int, int]) -> bool:
    return any(tuple(parameter.shape) == shape for parameter in module.parameters(recurse=False))


def _matrices(theirs: Any, name: str, turned: bool) -> tuple[Tensor, Tensor | None]:
    """[E, N, K] and the biases [E, N]."""
    stored = theirs.get_parameter(name).detach()
    bias = theirs.get_parameter(f"{name}_bias").detach() if theirs.has_bias else None
    return stored.transpose(1, 2) if turned else stored, bias


def halves_of(tensor: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate's and up's part, of what is joined in dim 1: views."""
    if interleaved:
        return tensor[:, ::2], tensor[:, 1::2]
    gate, up = tensor.chunk(2, dim=1)
    return gate, up


def _linears(weight_ENK: Tensor, bias_EN: Tensor | None) -> ExpertLinears:
    E, N, K = weight_ENK.shape
    with torch.device("meta"):
        linears = ExpertLinears(E, K, N, bias_EN is not None)
    linears.weight = nn.Parameter(weight_ENK, requires_grad=False)
    linears.bias = None if bias_EN is None else nn.Parameter(bias_EN, requires_grad=False)
    return linears


def _glu(theirs: Any) -> Glu:
    if type(theirs)._apply_gate.__name__ == _DEFAULT_GATE:
        is_silu = type(theirs.act_fn).__name__ in _SILU
        return silu_product if is_silu else partial(_gated, theirs.act_fn)
    gate = copy.copy(theirs)
    gate._parameters = {}  # it keeps what else its gating asks for
    return partial(_by_their_gate, gate, bool(theirs.is_concatenated))


def _gated(activation: Glu, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up  # type: ignore[call-arg]


def _by_their_gate(theirs: Any, joined: bool, gate: Tensor, up: Tensor) -> Tensor:
    made: Tensor = theirs._apply_gate(torch.cat((gate, up), -1) if joined else torch.stack((gate, up), -1).flatten(-2))
    return made
