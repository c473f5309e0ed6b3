"""Layers that stay gathered from forward to backward: the same gradients with fewer gathers, and freed when no backward
comes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qsharded.checkpoint import load_model
from qsharded.distributed.choose_layout import Layout
from qsharded.distributed.exact_all_gather import ExactAllGather
from qsharded.nn import LoRAConfig
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

LAYERS = 2


def run(folder: Path, keeps: bool) -> dict[str, Any]:
    """Two steps and an evaluation: the gradients, the gathers of each, whether all layers are cut again at the end."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = load_model(
        folder,
        mesh=mesh,
        lora=LoRAConfig(r=4),
        device="cpu",
        layout=Layout(keeps_gathered=keeps),
        activation_checkpointing="full",
    )
    gathers, call = [0], ExactAllGather.__call__

    def counted(self: ExactAllGather, *args: Any, **options: Any) -> Any:
        gathers[-1] += 1
        return call(self, *args, **options)

    ExactAllGather.__call__ = counted
    ids = torch.randint(61, (1, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(ids, targets_BS=ids.roll(-1, 1)).backward()
        gathers.append(0)
    with torch.no_grad():
        model(ids)
    ExactAllGather.__call__ = call
    layers = [p for name, p in model.named_parameters() if ".layers." in name]
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return {"gathers": gathers, "gradients": gradients, "freed": all(isinstance(p, DTensor) for p in layers)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


def test_they_are_gathered_once_a_step_and_give_the_same_gradients(folder: Path) -> None:
    for freed, kept in zip(run_ranks(run, 2, folder, False), run_ranks(run, 2, folder, True), strict=True):
        assert [a - b for a, b in zip(freed["gathers"], kept["gathers"], strict=True)] == [LAYERS, LAYERS, 0]
        assert freed["gradients"].keys() == kept["gradients"].keys()
        assert all(torch.equal(grad, kept["gradients"][name]) for name, grad in freed["gradients"].items())
        assert kept["freed"]
