"""The self-check at the start: it passes in every mode, and says what differs where anything does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded import train
from qsharded.checkpoint.adapter import trainable
from qsharded.checkpoint.load import Outline
from qsharded.config import TrainConfig
from qsharded.distributed import fsdp, placement
from qsharded.distributed.choose_layout import SHARDED, Layout
from qsharded.distributed.fsdp import layers_of
from qsharded.distributed.layer_twin import LayerTwin
from qsharded.distributed.world import World, mesh_of, start_world
from qsharded.fused import forwards
from qsharded.lora.config import LoRAConfig
from qsharded.lora.layer import LoRALinear
from qsharded.models import CausalLM
from qsharded.training.self_check import SelfCheckFailed, self_check
from qsharded.utils.checkpointing_modes import Checkpointing
from qsharded.utils.sharding import local
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import arguments
from tests.models.architectures import lora_of, write_architecture
from tests.models.variants import VARIANTS

TOKENS = 48
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"checkpointing": "full"},
    "offloaded": {"checkpointing": "offloaded"},
    "cpu-offload": {"checkpointing": "full", "layout": Layout(on_host=True)},
    "replicated": {"layout": Layout(replicated=True)},
    "split vocabulary": {"layout": Layout(vocab_parallel=True)},
    "hsdp": {"replicas": 2},
    "bf16": {"dtype": torch.bfloat16},
    "norms in full": {"lora": LoRAConfig(r=4, modules_to_save=("input_layernorm",))},
    "the second layer": {"lora": LoRAConfig(r=4, target_modules=r".*layers\.1\.mlp\..*")},
}


def world_of_ranks() -> World:
    """This rank's; it is left with the test."""
    return start_world() if torch.distributed.is_initialized() else World.single_process(torch.device("cpu"))


def built(world: World, folder: Path, mode: dict[str, Any]) -> tuple[CausalLM, LayerTwin]:
    lora, dtype = mode.get("lora", LoRAConfig(r=4, lora_dropout=0.5)), mode.get("dtype", torch.float32)
    outline = Outline.of(folder, lora, dtype, random_init=False, model_code=mode.get("code", "auto"))
    twin = LayerTwin(outline.model)
    checkpointing = Checkpointing(mode.get("checkpointing", "none"))
    mesh, layout = mesh_of(world, mode.get("replicas", 1)), mode.get("layout", SHARDED)
    return outline.filled(mesh, world.device, layout=layout, checkpointing=checkpointing, seed=0), twin


def check(world: World, model: CausalLM, twin: LayerTwin) -> str:
    """Its line, or its refusal; the model is as it was before."""
    before = {name: local(parameter).detach().clone() for name, parameter in trainable(model)}
    config = TrainConfig(model="m", dataset="d", max_length=TOKENS)
    try:
        said = self_check(config, world, model.train(), twin)
    except SelfCheckFailed as error:
        said = str(error)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
    for name, parameter in trainable(model):
        assert torch.equal(local(parameter), before[name]), name
    assert all(module.training for module in model.modules())
    return said


def lines_of(folder: Path, modes: list[dict[str, Any]]) -> list[str]:
    world = world_of_ranks()
    return [check(world, *built(world, folder, mode)) for mode in modes]


def exact(line: str, layer: int = 0) -> bool:
    return f"layer {layer} computes as its bytes unsharded: output within 0.0" in line


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_mode_passes(llama: Path, world_size: int) -> None:
    left_out = {"hsdp", "replicated"} if world_size == 1 else set()
    modes = {name: mode for name, mode in MODES.items() if name not in left_out}
    for said in run_ranks(lines_of, world_size, llama, list(modes.values())):
        for name, line in zip(modes, said, strict=True):
            assert "gather probe exact" in line, name
            if name == "bf16":
                assert "computes as its bytes unsharded: output within " in line, (name, line)
            else:
                assert exact(line, layer=int(name == "the second layer")), (name, line)
