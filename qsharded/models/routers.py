"""Routers of mixtures: which experts each token gets, and how they weigh. They stay in 16 bits, and frozen unless they
are trained in full: no adapter goes on a router.

Axes: M tokens, D hidden size, E experts, k of a token, Q groups of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharded.models.layer_shapes import ExpertMixture


class Choice(NamedTuple):
    """Of each token: its experts int64 [M, k], their weights [M, k], and the logits [M, E] that they come from."""

    experts_Mk: Tensor
    scores_Mk: Tensor
    logits_ME: Tensor


class Router(nn.Module):
    """Logits [M, E] of a linear map, and what each kind chooses by them."""

    is_router = True
    """For those who would quantize or adapt what has a weight."""

    def __init__(self, hidden_size: int, mixture: ExpertMixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.weight = nn.Parameter(torch.empty(mixture.experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_MD: Tensor) -> Choice:
        """Of x, in its dtype."""
        logits_ME = self.logits(x_MD)
        return Choice(*self.choose(logits_ME), logits_ME)

    def logits(self, x_MD: Tensor) -> Tensor:
        """[M, E]."""
        return F.linear(x_MD, self.weight.to(x_MD.dtype))

    def choose(self, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights, [M, k]."""
        raise NotImplementedError

    def _weighed(self, scores_Mk: Tensor, smallest: float = 0.0) -> Tensor:
        if self.mixture.normalised:
            scores_Mk = scores_Mk / (scores_Mk.sum(-1, keepdim=True) + smallest)
        return scores_Mk * self.mixture.scaling if self.mixture.scaling != 1 else scores_Mk


class SoftmaxRouter(Router):
    """The k most probable of all experts: Mixtral's and Qwen's."""

    def choose(self, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Router`; probabilities are of fp32."""
        scores_Mk, chosen_Mk = logits_ME.softmax(-1, dtype=torch.float32).topk(self.mixture.per_token, dim=-1)
        return chosen_Mk, self._weighed(scores_Mk)


class SoftmaxOfChosenRouter(Router):
    """The k largest logits, and the softmax of these alone: gpt-oss's, whose router has a bias."""

    def __init__(self, hidden_size: int, mixture: ExpertMixture) -> None:
        super().__init__(hidden_size, mixture)
        self.bias = nn.Parameter(torch.zeros(mixture.experts))

    def logits(self, x_MD: Tensor) -> Tensor:
        """As in :class:`Router`."""
        return F.linear(x_MD, self.weight.to(x_MD.dtype), self.bias.to(x_MD.dtype))

    def choose(self, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Router`."""
        scores_Mk, chosen_Mk = logits_ME.topk(self.mixture.per_token, dim=-1)
        return chosen_Mk, scores_Mk.softmax(-1)


class PreciseRouter(Router):
    """One whose logits are computed in fp32."""

    def logits(self, x_MD: Tensor) -> Tensor:
        """As in :class:`Router`, in fp32."""
        return F.linear(x_MD.float(), self.weight.float())


class SoftmaxOfGroupsRouter(PreciseRouter):
    """The k most probable experts of the groups that have the most probable one: DeepSeek-V2's (arXiv:2405.04434,
    section 2.2.2)."""

    def choose(self, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Router`."""
        scores_ME = logits_ME.softmax(-1)
        preferred_ME = _of_best_groups(scores_ME.detach(), self.mixture, by=1)
        chosen_Mk = preferred_ME.topk(self.mixture.per_token, dim=-1).indices
        return chosen_Mk, self._weighed(scores_ME.gather(1, chosen_Mk))


class SigmoidRouter(PreciseRouter):
    """Sigmoids of fp32 logits; a correction bias, which keeps experts evenly busy, counts in the choice alone, and only
    the best groups of experts are chosen from: DeepSeek-V3's and GLM-4.5's (arXiv:2412.19437)."""

    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, mixture: ExpertMixture) -> None:
        super().__init__(hidden_size, mixture)
        # no parameter: it never trains, and FSDP2 would gather it in 16 bits
        self.register_buffer("e_score_correction_bias", torch.zeros(mixture.experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmoidRouter":
        """As in nn.Module, but the bias stays in fp32: in bf16 a large one, such as 9.4, would lose what tells experts
        apart."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != before.dtype:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self

    def choose(self, logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Router`."""
        scores_ME = logits_ME.sigmoid()
        preferred_ME = scores_ME.detach() + self.e_score_correction_bias
        chosen_Mk = _of_best_groups(preferred_ME, self.mixture, by=2).topk(self.mixture.per_token, dim=-1).indices
        return chosen_Mk, self._weighed(scores_ME.gather(1, chosen_Mk), smallest=1e-20)


def _of_best_groups(preferred_ME: Tensor, mixture: ExpertMixture, *, by: int) -> Tensor:
    """-inf outside of the groups whose best ``by`` experts together are the most preferred."""
    if mixture.chosen_groups == mixture.groups:
        return preferred_ME
    of_groups_MQe = preferred_ME.unflatten(1, (mixture.groups, -1))
    best = of_groups_MQe.topk(by, dim=-1).values.sum(-1).topk(mixture.chosen_groups, dim=-1).indices
    is_best_MQ = torch.zeros_like(of_groups_MQe[..., 0], dtype=torch.bool).scatter_(1, best, True)
    return of_groups_MQe.masked_fill(~is_best_MQ[..., None], -torch.inf).flatten(1)


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "softmax of chosen": SoftmaxOfChosenRouter,
    "softmax of groups": SoftmaxOfGroupsRouter,
    "sigmoid": SigmoidRouter,
}
