"""Which token comes next, chosen where the logits are: nothing here waits for a GPU. Axes: B batch, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

NOT_FINITE = -1
"""In place of a row's token, where its logits hold NaN or infinity."""


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token. Otherwise tokens are drawn from the ``top_k`` likeliest (0: all), and of
    these from the likeliest that together reach probability ``top_p`` (https://arxiv.org/abs/1904.09751).

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def noise(self, logits_BV: Tensor) -> Tensor | None:
        """Memory for what chance adds, fp32 [B, V], exponentially distributed; None where tokens are not drawn."""
        return None if self.temperature == 0 else torch.empty_like(logits_BV, dtype=torch.float32)

    def choose(self, logits_BV: Tensor, noise_BV: Tensor | None) -> Tensor:
        """One token a row, [B], or ``NOT_FINITE``."""
        if noise_BV is None:
            token_B = logits_BV.argmax(dim=-1)
        else:
            # the first of processes whose rates are the probabilities: torch.multinomial's own way, without its checks
            token_B = (self._allowed(logits_BV).softmax(dim=-1) / noise_BV).argmax(dim=-1)
        return token_B.where(logits_BV.isfinite().all(dim=-1), NOT_FINITE)

    def _allowed(self, logits_BV: Tensor) -> Tensor:
        """Scaled, fp32; -infinity for tokens that are not to be drawn."""
        logits_BV = logits_BV.float() / self.temperature
        if 0 < self.top_k < logits_BV.shape[-1]:
            least_B1 = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        return _nucleus(logits_BV, self.top_p) if self.top_p < 1 else logits_BV


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Rule out every token whose likelier ones already reach `top_p` together (the likeliest always stays)."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    chances_BV = sorted_BV.softmax(dim=-1)
    likelier_BV = chances_BV.cumsum(dim=-1) - chances_BV
    return sorted_BV.masked_fill(likelier_BV >= top_p, -torch.inf).gather(-1, order_BV.argsort(dim=-1))
