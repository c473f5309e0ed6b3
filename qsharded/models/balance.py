"""How evenly a mixture's routers spread tokens over experts, gathered over the layers of a forward.

The balance loss is E sum_e f_e P_e over all layers' tokens together: f_e is how many of a token's k choices are expert
e, in the mean, and P_e the router's mean probability of it. It is least where both are even; its gradient flows through
P alone. Padding counts in neither.
Source: Fedus et al., "Switch Transformers", arXiv:2101.03961, equations 4 to 6; over layers as transformers takes it.

Axes: M tokens, E experts, k of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsharded.models.mixture import MixtureMLP
from qsharded.models.routers import SigmoidRouter


@dataclass
class RouterSums:
    """Over the tokens of a forward's mixtures: fp32 [E] how often each expert was chosen, [E] the sum of its
    probabilities, with gradient, and [] how many tokens there were."""

    chosen_E: Tensor
    probability_E: Tensor
    tokens: Tensor


class BalanceTally:
    """What the routers of a model choose, from one :meth:`take` to the next. A layer that is computed again for its
    backward adds once more, as its graph must be the same one; so it is emptied before a forward, too."""

    def __init__(self) -> None:
        self._sums: RouterSums | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "BalanceTally":
        """That of ``model``, to which its mixtures add from now on.

        Raises:
            ValueError: it has none, or its routers are balanced otherwise.
        """
        mixtures = [module for module in model.modules() if isinstance(module, MixtureMLP)]
        if not mixtures:
            raise ValueError(
                "--router-aux-loss-coef balances experts of a mixture computed natively, and there is none"
            )
        if isinstance(mixtures[0].get_submodule(mixtures[0].router_name), SigmoidRouter):
            raise ValueError("--router-aux-loss-coef: this model's correction bias balances its experts; leave it at 0")
        if mixtures[0].tally is None:
            tally = cls()
            for mixture in mixtures:
                mixture.tally = tally
        found = mixtures[0].tally
        assert isinstance(found, cls)
        return found

    def add(self, logits_ME: Tensor, chosen_Mk: Tensor, is_routed_M: Tensor | None) -> None:
        """A layer's."""
        weight_M = torch.ones_like(logits_ME[:, 0], dtype=torch.float32)
        if is_routed_M is not None:
            weight_M = is_routed_M.float()
        probability_E = (logits_ME.softmax(-1, dtype=torch.float32) * weight_M[:, None]).sum(0)
        chosen_E = torch.zeros_like(probability_E.detach())
        chosen_E.scatter_add_(0, chosen_Mk.flatten(), weight_M.repeat_interleave(chosen_Mk.shape[1]))
        before = self._sums or RouterSums(
            torch.zeros_like(chosen_E), torch.zeros_like(chosen_E), weight_M.new_zeros(())
        )
        self._sums = RouterSums(
            before.chosen_E + chosen_E, before.probability_E + probability_E, before.tokens + weight_M.sum()
        )

    def take(self) -> RouterSums | None:
        """What was added since the last time; None: nothing."""
        sums, self._sums = self._sums, None
        return sums
