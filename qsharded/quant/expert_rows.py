"""What lies between the products of a mixture's experts: by kernels on a GPU, else in plain PyTorch.

Axes: M tokens, k choices of a token, R rows sorted by expert, D hidden size, J intermediate size, n groups of rows, I
and O columns.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.quant.backends import takes_triton
from qsharded.quant.grouped import Ends, Groups, grouped_mm

Glu = Callable[[Tensor, Tensor], Tensor]
"""From gate and up [.., J] to what the down projection takes."""


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up: the :data:`Glu` that kernels know."""
    return F.silu(gate) * up


def combine(y_RD: Tensor, position_Mk: Tensor, scores_Mk: Tensor | None = None) -> Tensor:
    """Each token's sum over its choices of score * row, [M, D] in y's dtype; a position of -1 is no row."""
    if y_RD.is_meta or not y_RD.shape[0]:
        return y_RD.new_zeros(position_Mk.shape[0], y_RD.shape[1])
    if kernels := _kernels(y_RD):
        out_MD: Tensor = kernels.combine(y_RD, position_Mk, scores_Mk)
        return out_MD
    # what no expert computed may hold anything
    taken_MkD = y_RD[position_Mk.clamp(min=0)].masked_fill((position_Mk < 0)[..., None], 0)
    return (taken_MkD if scores_Mk is None else taken_MkD * scores_Mk[..., None]).sum(1).to(y_RD.dtype)


def glu_forward(glu: Glu, gate_RJ: Tensor, up_RJ: Tensor) -> Tensor:
    """``glu`` of gate and up, [R, J]."""
    if glu is silu_product and (kernels := _kernels(gate_RJ)):
        h_RJ: Tensor = kernels.swiglu(gate_RJ, up_RJ)
        return h_RJ
    return glu(gate_RJ, up_RJ)


def glu_backward(
    glu: Glu, gate_RJ: Tensor, up_RJ: Tensor, grad_RJ: Tensor, scores_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the gradients by gate and up behind each other [R, 2J], and <grad, h> [R], summed in fp32 at least.

    Args:
        grad_RJ: by h, before the scores.
        scores_R: by which h's gradient is multiplied for what comes before it.
    """
    if glu is silu_product and (kernels := _kernels(gate_RJ)):
        parts: tuple[Tensor, Tensor, Tensor] = kernels.swiglu_backward(gate_RJ, up_RJ, grad_RJ, scores_R)
        return parts
    with torch.enable_grad():
        inputs = gate_RJ.detach().requires_grad_(), up_RJ.detach().requires_grad_()
        h_RJ = glu(*inputs)
    grads = torch.autograd.grad(h_RJ, inputs, (grad_RJ * scores_R[:, None]).to(h_RJ.dtype))
    wide = torch.promote_types(h_RJ.dtype, torch.float32)
    dots_R = (grad_RJ.to(wide) * h_RJ.detach().to(wide)).sum(1)
    return h_RJ.detach(), torch.cat(grads, dim=1), dots_R


def add_grouped_(y_RO: Tensor, x_RI: Tensor, matrices_nIO: Tensor, groups: Groups | Ends) -> None:
    """To y each run's rows of x times its matrix; rows of no group may come out as anything."""
    if _kernels(y_RO):
        from qsharded_kernels import triton_grouped_update

        if triton_grouped_update.adds(*matrices_nIO.shape[:2]):
            triton_grouped_update.add_(y_RO, x_RI, matrices_nIO, groups.ends)
            return
    y_RO += grouped_mm(x_RI, matrices_nIO, groups)


class Places(Protocol):
    """Where pairs of a token and an expert go, in the order of their experts; ``triton_route`` says what each is."""

    order_P: Tensor
    position_P: Tensor
    ends_E: Tensor
    pieces_Q3: Tensor


def sorts(like: Tensor, pairs: int, experts: int) -> bool:
    """Whether :func:`sort` is for so many, where such a tensor lies."""
    if _kernels(like) is None or not pairs:
        return False
    from qsharded_kernels import triton_route

    return pairs <= triton_route.MOST_PAIRS and experts <= triton_route.MOST_EXPERTS


def sort(chosen_Mk: Tensor, experts: int, most: int) -> Places:
    """Of each token's experts, int64, ``experts`` being none; pieces are of at most ``most`` rows."""
    from qsharded_kernels import triton_route

    places: Any = triton_route.route(chosen_Mk.flatten().contiguous(), experts, most)
    found: Places = places
    return found


def _kernels(like: Tensor) -> ModuleType | None:
    """Triton's, where they serve."""
    if not takes_triton(like):
        return None
    from qsharded_kernels import triton_experts  # here: Triton loads slowly

    return triton_experts
