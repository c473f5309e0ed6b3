"""Pre-training of the built-in base: a plain loop over the project's own data path and decoder."""

import math
from collections.abc import Iterator
from itertools import islice

import torch

from qsharded.data import Example, Step, StepLoader
from qsharded.models import CausalLM
from qsharded.optim.schedule import learning_rate
from qsharded.training.objective import batch_loss

PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-3, 100, 0.1, 1.0
ROW_TOKENS, ROWS = 128, 16  # about 80 conversations a step


def initialise(model: CausalLM, generator: torch.Generator) -> None:
    """Weights of standard deviation 1/sqrt(fan-in); less where a matrix writes to the residual stream."""
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # the norms are ones already
        scale = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5, generator=generator)


def pretrain(model: CausalLM, examples: list[Example], pad_id: int, *, steps: int, seed: int) -> Iterator[float]:
    """Train `model` in place with AdamW for `steps` optimizer steps; yields each step's loss a supervised token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    for number, step in enumerate(islice(_steps(examples, pad_id, seed), steps)):
        rate = learning_rate(number, peak=PEAK_RATE, total_steps=steps, warmup_steps=WARMUP_STEPS, kind="cosine")
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = sum(batch_loss(model, batch) for batch in step.micro_batches) / step.trained_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def _steps(examples: list[Example], pad_id: int, seed: int) -> Iterator[Step]:
    loader = StepLoader(
        examples,
        max_length=ROW_TOKENS,
        packing=True,
        batch_size=ROWS,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=seed,
        pad_id=pad_id,
    )
    return loader.steps()
