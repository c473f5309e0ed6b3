"""Where a loaded model's parameters are: every rank holds its share of each, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qsharded import parallel, vocabulary
from qsharded.checkpoint import load_model
from qsharded.layout import Layout, check_shares
from qsharded.nn import LoRAConfig
from qsharded.parallel import World
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320)


def held(folder: Path, world_size: int, replicas: int, options: dict[str, Any]) -> dict[str, tuple[int, int, bool]]:
    """(bytes here, bytes in all, whether it trains) of each parameter."""
    world = World(dist.get_rank(), world_size, torch.device("cpu"), init_device_mesh("cpu", (world_size,)))
    model = load_model(folder, mesh=parallel.mesh_of(world, replicas), lora=LoRAConfig(r=4), device="cpu", **options)
    return {
        name: (parallel.local(p).untyped_storage().nbytes(), p.numel() * p.itemsize, p.requires_grad)
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("world_size", "replicas", "options"),
    [
        (4, 1, {}),
        (4, 1, {"layout": Layout(split_vocabulary=True)}),
        (4, 2, {"layout": Layout(split_vocabulary=True)}),
        (2, 1, {"layout": Layout(on_host=True), "activation_checkpointing": "full"}),
    ],
)
def test_every_rank_holds_its_share_of_all(
    folder: Path, world_size: int, replicas: int, options: dict[str, Any]
) -> None:
    ranks = run_ranks(held, world_size, folder, world_size, replicas, options)
    shards = world_size // replicas
    for name, (_, total, _) in ranks[0].items():
        here = [rank[name][0] for rank in ranks]
        assert total * replicas <= sum(here), name
        row = total // 97 if "embed" in name or "lm_head" in name else 192 * 2  # the widest unpacked row
        assert max(here) <= total // shards + row, name


def test_a_replicated_base_is_whole_and_its_adapters_are_cut(folder: Path) -> None:
    for rank in run_ranks(held, 2, folder, 2, 1, {"layout": Layout(replicated=True)}):
        assert {name.split(".lora_")[0] != name for name, (here, total, _) in rank.items() if here < total} == {True}
        assert all((here < total) == trains for here, total, trains in rank.values())


def complaint(folder: Path, name: str) -> str:
    """What is said of a parameter that a rank holds whole."""
    mesh = init_device_mesh("cpu", (2,))
    model = load_model(folder, mesh=mesh, device="cpu")
    module = model.get_submodule(name.rpartition(".")[0])
    whole = torch.zeros(model.get_parameter(name).shape, dtype=torch.bfloat16)
    module.weight = nn.Parameter(whole, requires_grad=False)
    try:
        check_shares(model, mesh)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_parameter_that_was_left_whole_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for message in run_ranks(complaint, 2, folder, name):
        assert f"holds {320 * 192 // 2:,} bytes of {name}" in message
        assert f"its share is {160 * 192 // 2:,}" in message


def kinds(folder: Path, limit: int, options: dict[str, Any]) -> tuple[str, str]:
    vocabulary.LARGE_BYTES = limit
    model = load_model(folder, mesh=init_device_mesh("cpu", (2,)), device="cpu", **options)
    embedding, head = (type(part).__name__.removeprefix("FSDP") for part in (model.model.embed_tokens, model.lm_head))
    return embedding, head


def test_a_large_frozen_vocabulary_is_split(folder: Path) -> None:
    size = 97 * 192 * 2
    split, whole = ("SplitEmbedding", "SplitHead"), ("Embedding", "Head")
    assert run_ranks(kinds, 2, folder, size - 1, {}) == [split] * 2
    assert run_ranks(kinds, 2, folder, size, {}) == [whole] * 2
    assert run_ranks(kinds, 2, folder, 0, {"layout": Layout(replicated=True)}) == [whole] * 2
    trains = {"lora": LoRAConfig(r=4, modules_to_save=["embed_tokens"])}
    assert run_ranks(kinds, 2, folder, 0, trains) == [whole] * 2


def test_ranks_that_cannot_be_divided_are_told() -> None:
    world = World(0, 6, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="--dp-replicate 4 does not divide the 6 ranks"):
        parallel.mesh_of(world, 4)


def test_contradictions_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="either replicated"):
        Layout(replicated=True, on_host=True)
    with pytest.raises(ValueError, match="full or offloaded, got selective"):
        load_model(folder, device="cpu", layout=Layout(on_host=True), activation_checkpointing="selective")
