"""What a layer's inputs are like: the mean of x^T x over all calibration tokens, and its factors.

Axes: K = in_features.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qsharded.utils import collectives

RELATIVE_DAMPING = 0.1  # of each column's own entry: without it error goes to columns that other texts use
MEAN_DAMPING = 0.01  # of the mean entry: it keeps the factors finite


class SecondMoments:
    """The sum of x^T x over tokens, in fp32.

    Attributes:
        sum_KK: so far.
        tokens: how many there were.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_KK = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., K] of further tokens."""
        x_TK = x.reshape(-1, x.shape[-1])
        self.tokens += x_TK.shape[0]
        if x_TK.is_cuda and x_TK.dtype in (torch.bfloat16, torch.float16):
            self.sum_KK += torch.mm(x_TK.T, x_TK, out_dtype=torch.float32)  # type: ignore[call-overload]
        else:
            x_TK = x_TK.float()
            self.sum_KK.addmm_(x_TK.T, x_TK)

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Add up those of all ranks."""
        collectives.all_reduce(self.sum_KK, dist.ReduceOp.SUM, group)
        tokens = torch.tensor(self.tokens, device=self.sum_KK.device)
        self.tokens = int(collectives.all_reduce(tokens, dist.ReduceOp.SUM, group))

    def add_like(self, other: "SecondMoments", tokens: int) -> None:
        """Add so many tokens that are like those of ``other`` on average."""
        self.sum_KK += other.sum_KK * (tokens / max(other.tokens, 1))
        self.tokens += tokens

    def add_even(self, tokens: int) -> None:
        """Add so many tokens as large as those that there are, which use all columns alike and none with another."""
        self.sum_KK.diagonal().add_(self.sum_KK.diagonal().mean() * (tokens / max(self.tokens, 1)))
        self.tokens += tokens

    def demand_finite(self, name: str) -> None:
        """Raise ValueError where it is not; ``name`` is the weight's that sees these inputs."""
        if not self.sum_KK.isfinite().all():
            raise ValueError(f"the inputs of {name} are not finite: the checkpoint is damaged, or overflows")

    def damped(self, name: str) -> "DampedMoments":
        """The mean, damped.

        Raises:
            ValueError: as :meth:`demand_finite`.
        """
        self.demand_finite(name)
        return DampedMoments.of(self.sum_KK / max(self.tokens, 1))


@dataclass(frozen=True)
class DampedMoments:
    """Second moments H to which multiples of the identity and of their own diagonal are added.

    Attributes:
        H_KK: fp32, positive definite.
    """

    H_KK: Tensor

    @classmethod
    def of(cls, mean_KK: Tensor) -> "DampedMoments":
        """``mean_KK`` is changed. A column that no token used counts as little as the damping says."""
        diagonal_K = mean_KK.diagonal()
        diagonal_K *= 1 + RELATIVE_DAMPING
        mean = diagonal_K.mean()
        diagonal_K += torch.where(mean > 0, MEAN_DAMPING * mean, 1)
        return cls(mean_KK)

    @property
    def importance_K(self) -> Tensor:
        """fp32 [K]: of each input column."""
        return self.H_KK.diagonal()

    def inverse_factor(self, order_K: Tensor) -> Tensor:
        """fp32 [K, K]: upper U with U^T U = inv(H[order, order]).

        With J the reversal of rows, J H J = L L^T gives H = R R^T of the upper R = J L J, and U is its inverse: one
        Cholesky factor and one triangular inverse, in fp64, and no inverse of H.
        """
        backwards_K = order_K.flip(0)
        L_KK = torch.linalg.cholesky(self.H_KK[backwards_K][:, backwards_K].double())
        R_KK = L_KK.flip(0, 1)
        identity_KK = torch.eye(R_KK.shape[0], dtype=R_KK.dtype, device=R_KK.device)
        return torch.linalg.solve_triangular(R_KK, identity_KK, upper=True).float().contiguous()

    def factor(self) -> Tensor:
        """fp64 [K, K]: lower L with L L^T = H."""
        return torch.linalg.cholesky(self.H_KK.double())
