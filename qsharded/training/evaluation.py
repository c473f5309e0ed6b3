"""What a model is worth on held-out rows: loss and perplexity, and exact answers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qsharded.config.evaluated import measure
from qsharded.data import Prompt, Step, Tokenizer
from qsharded.distributed.world import World
from qsharded.models import CausalLM
from qsharded.models.generation import generate
from qsharded.training import objective
from qsharded.utils import collectives


@torch.no_grad()
def validation_loss(model: CausalLM, steps: Iterable[Step], world: World, name: str = "") -> dict[str, float]:
    """``eval_loss`` (nats a trained token) and ``eval_perplexity`` over all rows, or ``eval_NAME_loss`` and the like of
    a set that has a name; every rank calls this."""
    model.eval()
    loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for step in steps:
        for batch in step.micro_batches:
            loss_sum += objective.batch_loss(model, batch.to(world.device))
        tokens += step.trained_tokens
    model.train()
    loss = global_sum(loss_sum, world) / tokens
    return {measure(name, "loss"): loss, measure(name, "perplexity"): math.exp(min(loss, 700.0))}


def global_sum(value: torch.Tensor, world: World) -> float:
    """The sum over ranks of one number."""
    return collectives.all_reduce(value, dist.ReduceOp.SUM, world.group).item()


@dataclass(frozen=True)
class ExactMatch:
    """The share of answers that equal the reference to the character, and what was answered, in the prompts' order."""

    accuracy: float
    answers: list[str]


def exact_match(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    before_forward: Callable[[], object] = lambda: None,
) -> ExactMatch:
    """Greedy answers to ``prompts`` against their references; every rank calls this and gets the same.

    What ``before_forward`` raises ends it.
    """
    room = max(len(tokenizer.encode(prompt.answer)) for prompt in prompts) + 8
    found = answers(model, tokenizer, prompts, room, batch_size=batch_size, before_forward=before_forward)
    right = sum(answer.strip() == prompt.answer.strip() for answer, prompt in zip(found, prompts, strict=True))
    return ExactMatch(right / len(prompts), found)


def answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    batch_size: int = 64,
    before_forward: Callable[[], object] = lambda: None,
) -> list[str]:
    """Greedy answers in the prompts' order; every rank calls this and gets the same. It ends as :func:`exact_match`."""
    model.eval()
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        ids = [prompt.ids for prompt in prompts[start : start + batch_size]]
        tokens = generate(
            model, ids, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids, before_forward=before_forward
        )
        found += [tokenizer.decode([t for t in row if t not in tokenizer.eos_ids]) for row in tokens]
    model.train()
    return found
