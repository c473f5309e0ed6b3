"""The usual objective with the balance loss of a mixture's experts beside it."""

import torch
import torch.distributed as dist

from qsharded.config import TrainConfig
from qsharded.data import Batch, Step
from qsharded.models import CausalLM
from qsharded.models.balance import BalanceTally
from qsharded.training.objective import SUPERVISED, BatchSums, Objective
from qsharded.utils import collectives
from qsharded.utils.documents import IGNORE


def objective_of(config: TrainConfig, model: CausalLM) -> Objective:
    """What a run of ``model`` trains for.

    Raises:
        ValueError: experts are to be balanced that the model does not have, or balances otherwise.
    """
    if not config.router_aux_loss_coef:
        return SUPERVISED
    BalanceTally.of(model)
    return BalancedFineTuning(config.router_aux_loss_coef)


class BalancedFineTuning:
    """The trained tokens' cross-entropy, and ``coefficient`` times the balance loss of each micro-batch over all ranks,
    which counts as many times as it has trained tokens: their mean, that is, over a step.

    What each expert got is added over all ranks before the product with the probabilities, so a step on two ranks is
    that of one which has all of the rows.
    """

    def __init__(self, coefficient: float) -> None:
        self._coefficient = coefficient

    def __call__(self, model: CausalLM, batch: Batch) -> BatchSums:
        """The sums over a batch of this rank's. A collective: every rank calls it at the same time."""
        tally = BalanceTally.of(model)
        tally.take()
        loss = SUPERVISED(model, batch).loss
        sums = tally.take()
        assert sums is not None
        trained = (batch.targets != IGNORE).sum().float()
        of_all = torch.cat((sums.chosen_E, sums.tokens[None], trained[None]))
        collectives.all_reduce(of_all, dist.ReduceOp.SUM, collectives.every_rank())
        chosen_E, tokens, trained = of_all[:-2], of_all[-2].clamp(min=1), of_all[-1]
        balance = (chosen_E / tokens * sums.probability_E / tokens).sum() * len(chosen_E) * trained
        return BatchSums(loss + self._coefficient * balance, {"router_balance": balance.detach()})

    def count(self, step: Step) -> int:
        """Supervised tokens."""
        return SUPERVISED.count(step)
