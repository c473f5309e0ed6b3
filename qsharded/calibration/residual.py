"""Adapters that begin where rounding left off: the best low-rank update for a layer's inputs.

As LoftQ (Li et al., arXiv:2310.08659) an adapter starts from a singular value decomposition of the rounding error, here
of the error of the layer's outputs: least is ``|(W - Q - update) L|`` with ``L L^T`` the inputs' second moments.

Axes: N = out_features, K = in_features, r = rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsharded.calibration.layer_inputs import LayerInputs
from qsharded.calibration.layer_walk import LayerWalk
from qsharded.checkpoint.source import SafetensorsFolder
from qsharded.utils.seeds import derived_seed

_OVERSAMPLED, _ITERATIONS = 16, 4  # of the randomized decomposition: singular values to some 1e-4 of the exact ones

Rounded = Callable[[str, Tensor], Tensor | None]
"""From the name of a weight and its 16 bits [N, K] to what its 4 bits decode to, fp32; None where it is not packed."""


@dataclass(frozen=True)
class AdapterShape:
    """Of one layer: its rank, and what its update is multiplied by."""

    r: int
    scaling: float


@torch.no_grad()
def residual_factors(error_NK: Tensor, L_KK: Tensor, shape: AdapterShape, seed: int) -> tuple[Tensor, Tensor]:
    """lora_A fp32 [r, K] and lora_B fp32 [N, r] whose scaled product is the best for ``error_NK``, W - Q.

    Args:
        L_KK: fp32, lower.
        seed: of the randomized decomposition (Halko et al., arXiv:0909.4061).

    Rows of A beyond the matrix's rank are zero, and so are those columns of B.
    """
    outputs_NK = error_NK @ L_KK
    r = min(shape.r, *error_NK.shape)
    with torch.random.fork_rng(devices=[error_NK.device] if error_NK.is_cuda else []):
        torch.manual_seed(seed)
        size = min(r + _OVERSAMPLED, *error_NK.shape)
        U_Nq, s_q, V_Kq = torch.svd_lowrank(outputs_NK, q=size, niter=_ITERATIONS)
    root_r = (s_q[:r] / shape.scaling).sqrt()
    A_rK = torch.linalg.solve_triangular(L_KK, root_r[:, None] * V_Kq[:, :r].T, upper=False, left=False)
    missing = shape.r - r
    return nn.functional.pad(A_rK, (0, 0, 0, missing)), nn.functional.pad(U_Nq[:, :r] * root_r, (0, missing))


def residual_start(
    walk: LayerWalk,
    source: SafetensorsFolder,
    rounded: Rounded,
    shapes: Mapping[str, AdapterShape],
    group: dist.ProcessGroup | None = None,
    *,
    shows_progress: bool = True,
) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B, fp32 on the CPU, of the packed layers whose weights are in ``shapes``, by their names.

    Layers see what the rounded layers before them give. All ranks of ``group`` call this, each with its own rows.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for number in walk.in_turn("starting adapters", shows_progress=shows_progress):
        packed = {name: m for name, m in walk.linears(number).items() if _round(m, rounded(name, m.weight))}
        inputs = LayerInputs({name: m for name, m in packed.items() if name in shapes})
        with inputs.watched():
            walk.run(number, keep=True)
        for moments, names in inputs.groups():
            moments.agree(group)
            L_KK = moments.damped(names[0]).factor().float()
            for name in names:
                found[name] = _factors(source, name, rounded, L_KK, shapes[name])
    return found


def _round(linear: nn.Linear, decoded: Tensor | None) -> bool:
    """Have ``linear`` compute as the packed one does; whether there is one."""
    if decoded is not None:
        linear.weight.data = decoded.to(linear.weight.dtype)
    return decoded is not None


def _factors(
    source: SafetensorsFolder, name: str, rounded: Rounded, L_KK: Tensor, shape: AdapterShape
) -> tuple[Tensor, Tensor]:
    weight_NK = source.whole(name).to(L_KK.device)
    decoded_NK = rounded(name, weight_NK)
    assert decoded_NK is not None
    A, B = residual_factors(weight_NK.float() - decoded_NK, L_KK, shape, derived_seed("residual", name))
    return A.cpu(), B.cpu()
