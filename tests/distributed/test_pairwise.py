"""Another objective than the tokens' loss: pairs of answers, of which one is to become likelier than the other.

Source: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290.
"""

import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsharded.config import TrainConfig
from qsharded.data import Batch, Example, Step, StepLoader
from qsharded.distributed import vocab_parallel as parallel_head
from qsharded.distributed.world import start_world
from qsharded.lora.disabled import adapters_disabled
from qsharded.models import CausalLM
from qsharded.report.run_files import read_metrics
from qsharded.training import setup
from qsharded.training.objective import BatchSums, batch_log_probs
from qsharded.training.trainer import Trainer
from tests.checkpoints import write_chat_checkpoint, write_chat_rows
from tests.distributed.harness import run_ranks

PAIRS, STEPS, BETA = 7, 3, 0.5


class Pairwise:
    """-log sigmoid(beta * (chosen - rejected)) of each pair, in log-probabilities relative to the base model's."""

    def __call__(self, model: CausalLM, batch: Batch) -> BatchSums:
        with adapters_disabled(model):
            reference_BP2 = answers(batch_log_probs(model, batch), batch)
        relative_BP2 = answers(batch_log_probs(model, batch), batch) - reference_BP2
        margin_BP = BETA * (relative_BP2[..., 0] - relative_BP2[..., 1])
        exists_BP = reference_BP2[..., 0] != 0
        right = ((margin_BP > 1e-3) & exists_BP).sum()
        return BatchSums(-(F.logsigmoid(margin_BP) * exists_BP).sum(), {"preferred": right})

    def count(self, step: Step) -> int:
        return step.groups


def answers(log_probs_BS: Tensor, batch: Batch) -> Tensor:
    """The sum over each document of a row, [B, P, 2]: two neighbours are a pair."""
    documents_BS = torch.full_like(batch.targets, -1) if batch.document_ids is None else batch.document_ids
    sums_BP = log_probs_BS.new_zeros(len(log_probs_BS), 2 * PAIRS + 1)  # the last is the padding's
    sums_BP = sums_BP.scatter_add(1, documents_BS.where(documents_BS >= 0, 2 * PAIRS), log_probs_BS)
    return sums_BP[:, :-1].unflatten(1, (-1, 2))


def pairs() -> list[Example]:
    """A prompt and two answers to it, of unequal lengths."""
    random, made = Random(3), []
    for number in range(PAIRS):
        prompt = [random.randrange(4, 90) for _ in range(random.randint(2, 9))]
        for _ in range(2):
            answer = [random.randrange(4, 90) for _ in range(random.randint(1, 12))]
            made.append(Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), group=number))
    return made


def train(model: Path, rows: Path, out: Path, packing: bool, vocab_parallel: bool) -> None:
    world = start_world()
    batch_size = 4 // world.size
    config = TrainConfig(
        model=str(model),
        dataset=str(rows),
        output_dir=str(out),
        max_length=64,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        save_steps=0,
        dtype="float32",
        optim="adamw",
        adam_epsilon=1e-3,  # or it would blow the last bits of a tiny gradient up
        lora_dropout=0.0,
    )
    if vocab_parallel:
        parallel_head.is_large = lambda model: True
    prepared = setup.prepare(config, world)
    heads = [m for m in prepared.model.modules() if isinstance(m, parallel_head.VocabParallelHead)]
    assert bool(heads) == vocab_parallel
    loader = StepLoader(
        pairs(),
        max_length=64,
        packing=packing,
        batch_size=batch_size,
        accumulation=1,
        rank=world.rank,
        world_size=world.size,
        seed=0,
        pad_id=0,
    )
    again: Any = None  # nothing is advised here
    with Trainer.opened(config, world, replace(prepared, loader=loader), again, objective=Pairwise()) as trainer:
        trainer.train()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_train_alike_on_one_rank_and_on_two(model: Path, tmp_path: Path, packing: bool) -> None:
    rows = write_chat_rows(tmp_path / "rows.jsonl", 8)
    found = {}
    for ranks in (1, 2):
        run_ranks(train, ranks, model, rows, tmp_path / str(ranks), packing, ranks == 2 and packing)
        found[ranks] = read_metrics(tmp_path / str(ranks) / "metrics.jsonl")
    one, two = found[1], found[2]
    assert one[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the adapters begin at no change
    assert one[0]["preferred"] == 0
    assert one[-1]["loss"] < 0.9 * math.log(2)
    assert one[-1]["preferred"] > 0.5
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5), key
    assert [row["preferred"] for row in two] == [row["preferred"] for row in one]
