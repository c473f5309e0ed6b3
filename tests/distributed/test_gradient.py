"""The gradient is that of the mean over all trained tokens, however the rows are split."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.data import Cursor, Example, Step, StepLoader, make_batch
from qsharded.distributed.world import World, start_world
from qsharded.nn import LoRAConfig
from qsharded.training import objective
from qsharded.training.gradient import accumulate_gradient
from qsharded.training.objective import batch_loss
from qsharded.utils.sharding import local, whole
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

ROWS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def examples() -> list[Example]:
    """Rows of very unequal length and share of trained tokens: a mean of means would be far off."""
    random = Random(5)
    made = []
    for _ in range(ROWS):
        length = random.randint(3, 40)
        trained_from = random.randint(1, length - 1)
        made.append(Example([random.randrange(97) for _ in range(length)], [i >= trained_from for i in range(length)]))
    return made


def gradient(
    folder: Path, batch_size: int, accumulation: int, packing: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every trainable parameter's gradient over one step of all rows, whole."""
    world = start_world()
    lora = LoRAConfig(r=4, modules_to_save=["lm_head"])
    model = load_model(folder, mesh=world.mesh, lora=lora, dtype=dtype, seed=3)
    with torch.no_grad():  # with B at zero, A's gradient would be zero too
        for name, parameter in trainable(model):
            if "lora_B" in name:
                local(parameter).fill_(0.02)
    loader = StepLoader(
        examples(),
        max_length=64,
        packing=packing,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.size,
        seed=0,
        pad_id=0,
    )
    step = next(loader.steps(Cursor()))
    accumulate_gradient(model, step, world, seed=0, step_number=0)
    return {name: whole(parameter.grad) for name, parameter in trainable(model)}


def test_dropout_differs_by_rank_step_and_micro_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows everywhere, so that the losses differ by what is dropped alone; and once more, the same losses."""
    model = load_model(folder, lora=LoRAConfig(r=4, lora_dropout=0.5), dtype=torch.float32, seed=3)
    for name, parameter in trainable(model):
        if "lora_B" in name:
            parameter.data.fill_(0.02)
    batch = make_batch([[examples()[0]]], pad_id=0, max_length=64)
    step = Step([batch, batch], trained_tokens=1, tokens=1, groups=1, cursor=Cursor())
    losses: list[float] = []

    def noted(*args: Any) -> Tensor:
        losses.append((loss := batch_loss(*args)).item())
        return loss

    monkeypatch.setattr(objective, "batch_loss", noted)
    for rank, step_number in 2 * [(0, 0), (0, 1), (1, 0), (1, 1)]:
        world = World(rank, 2, torch.device("cpu"), None)
        accumulate_gradient(model, step, world, seed=0, step_number=step_number)
    assert len(set(losses[:8])) == 8
    assert losses[8:] == losses[:8]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    """One process, all rows in one batch."""
    return run_ranks(gradient, 1, folder, ROWS, 1, False)[0]


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation", "packing"),
    [
        (1, 1, 12, False),
        (1, 5, 3, True),
        (2, 3, 2, False),
        (2, 6, 1, True),
        (3, 2, 2, False),
        (3, 4, 1, True),  # fewer packed rows than places: a rank has padding alone
        (4, 1, 3, False),
    ],
)
def test_same_gradient_for_every_split(
    folder: Path, expected: dict[str, Tensor], world_size: int, batch_size: int, accumulation: int, packing: bool
) -> None:
    for found in run_ranks(gradient, world_size, folder, batch_size, accumulation, packing):
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            assert want.norm() > 0
            assert (found[name] - want).norm() / want.norm() < 1e-5, name


def test_bf16_activations_give_the_same_gradient_to_their_precision(folder: Path, expected: dict[str, Tensor]) -> None:
    """bf16 keeps 8 bits; a mean of means would be off by more than half."""
    for found in run_ranks(gradient, 3, folder, 2, 2, False, torch.bfloat16):
        for name, want in expected.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - want).norm() / want.norm() < 0.05, name
