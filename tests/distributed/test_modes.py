"""Training goes alike in every mode: the same losses and the same adapter as one process without any of them."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qsharded import evaluation, parallel
from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.data import Cursor, Example, StepLoader
from qsharded.models.generation import generate
from qsharded.nn import LoRAConfig
from qsharded.parallel import Layout, World
from qsharded.train import accumulate_gradient
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

VOCAB = 97  # two ranks share it unevenly, as they do 5 x 64 columns of the MLP's rows on three
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A checkpoint with and one without a tied head."""
    return {
        tied: write_checkpoint(
            tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320, tie_word_embeddings=tied
        )
        for tied in (False, True)
    }


def rows() -> list[Example]:
    random = Random(5)
    lengths = [random.randint(3, 40) for _ in range(4 * STEPS)]
    return [Example([random.randrange(VOCAB) for _ in range(n)], [i >= n // 3 for i in range(n)]) for n in lengths]


def train(folder: Path, world_size: int, replicas: int, options: dict[str, Any]) -> dict[str, Any]:
    """Losses, the adapter and what the model says after a few steps of four rows in all."""
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    world = World(dist.get_rank(), world_size, torch.device("cpu"), mesh)
    options = {"lora": LoRAConfig(r=4, lora_dropout=0.0), "dtype": torch.float32} | options
    model = load_model(folder, mesh=parallel.mesh_of(world, replicas), device="cpu", seed=3, **options)
    loader = StepLoader(
        rows(),
        max_length=64,
        packing=False,
        batch_size=1,
        accumulation=4 // world_size,
        rank=world.rank,
        world_size=world_size,
        seed=0,
        pad_id=0,
    )
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=5e-3)
    losses = []
    for number, step in zip(range(STEPS), loader.steps(Cursor()), strict=False):
        loss = accumulate_gradient(model, step, world, seed=0, step_number=number)
        losses.append(evaluation.global_sum(loss, world) / step.supervised_tokens)
        optimizer.step()
        optimizer.zero_grad()
    said = generate(model, [[5, 6, 7], [9]], max_new_tokens=6, eos_ids=[])
    return {"losses": losses, "adapter": {n: parallel.whole(p.detach()) for n, p in trainable(model)}, "said": said}


def saves_head() -> dict[str, Any]:
    return {"lora": LoRAConfig(r=4, modules_to_save=["lm_head"])}


@pytest.fixture(scope="module")
def alone(folders: dict[bool, Path]) -> Any:
    """What one process without modes makes of it, for each tying and for a head that trains."""
    known: dict[tuple[bool, bool], dict[str, Any]] = {}

    def of(tied: bool, trains_head: bool) -> dict[str, Any]:
        key = (tied, trains_head)
        if key not in known:
            options = saves_head() if trains_head else {}
            known[key] = run_ranks(train, 1, folders[tied], 1, 1, options)[0]
        return known[key]

    return of


SPLIT = Layout(split_vocabulary=True)
REPLICATED = Layout(replicated=True)
ON_HOST = Layout(on_host=True)


@pytest.mark.parametrize(
    ("world_size", "replicas", "tied", "options"),
    [
        (1, 1, False, {"activation_checkpointing": "selective"}),
        (1, 1, False, {"activation_checkpointing": "offloaded"}),
        (1, 1, True, {"layout": ON_HOST, "activation_checkpointing": "full"}),
        (2, 1, False, {}),
        (2, 1, False, {"layout": SPLIT}),
        (2, 1, True, {"layout": SPLIT, "activation_checkpointing": "offloaded"}),
        (2, 1, False, {"layout": ON_HOST, "activation_checkpointing": "offloaded"}),
        (2, 1, False, {"layout": REPLICATED, "activation_checkpointing": "full"}),
        (2, 2, False, {"activation_checkpointing": "selective"}),
        (4, 2, False, {"layout": SPLIT}),
        (4, 2, True, {"layout": ON_HOST, "activation_checkpointing": "full"}),
        (2, 1, False, saves_head() | {"layout": SPLIT}),  # a head that trains is gathered, and so is the embedding
        (2, 1, False, saves_head() | {"layout": ON_HOST, "activation_checkpointing": "full"}),
        (2, 1, False, saves_head() | {"layout": REPLICATED}),
    ],
)
def test_training_goes_as_in_one_process(
    folders: dict[bool, Path], alone: Any, world_size: int, replicas: int, tied: bool, options: dict[str, Any]
) -> None:
    expected = alone(tied, "lora" in options)
    assert expected["losses"][-1] < expected["losses"][0]
    for found in run_ranks(train, world_size, folders[tied], world_size, replicas, options):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["said"] == expected["said"]
        assert found["adapter"].keys() == expected["adapter"].keys()
        for name, parameter in expected["adapter"].items():
            # Adam turns the last bits of a tiny gradient into a step of its own size: 3 steps of 5e-3 at the most
            gap = (found["adapter"][name] - parameter).norm() / parameter.norm()
            assert gap < 1e-4, name
