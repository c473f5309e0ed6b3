"""Where a loaded model's parameters are: every rank holds its share of each, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint import load_model
from qsharded.distributed import vocab_parallel
from qsharded.distributed.choose_layout import Layout
from qsharded.distributed.placement import check_shares
from qsharded.distributed.world import World, mesh_of
from qsharded.nn import LoRAConfig
from qsharded.utils.sharding import local
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

WIDEST_ROW = 320 * 4  # bytes, of an fp32 lora_A on 320 columns; FSDP2 pads the last ranks' shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320)


Held = dict[str, tuple[int, int, bool]]


def held(folder: Path, replicas: int, modes: list[dict[str, Any]]) -> list[Held]:
    """In each mode (bytes here, bytes in all, whether it trains) of each parameter."""
    ranks = dist.get_world_size()
    world = World(dist.get_rank(), ranks, torch.device("cpu"), init_device_mesh("cpu", (ranks,)))
    mesh = mesh_of(world, replicas)
    return [_held(load_model(folder, mesh=mesh, lora=LoRAConfig(r=4), device="cpu", **mode)) for mode in modes]


def _held(model: nn.Module) -> Held:
    return {
        name: (local(p).untyped_storage().nbytes(), p.numel() * p.itemsize, p.requires_grad)
        for name, p in model.named_parameters()
    }


SPLIT = {"layout": Layout(vocab_parallel=True)}
ON_HOST = {"layout": Layout(on_host=True), "activation_checkpointing": "full"}


@pytest.mark.parametrize(
    ("world_size", "replicas", "modes"), [(3, 1, [{}, SPLIT]), (4, 2, [SPLIT, ON_HOST]), (2, 2, [{}])]
)
def test_every_rank_holds_its_share_of_all(
    folder: Path, world_size: int, replicas: int, modes: list[dict[str, Any]]
) -> None:
    shards = world_size // replicas
    for ranks in zip(*run_ranks(held, world_size, folder, replicas, modes), strict=True):
        for name, (_, total, _) in ranks[0].items():
            here = [rank[name][0] for rank in ranks]
            assert total * replicas <= sum(here), name
            assert max(here) <= total // shards + WIDEST_ROW, name


def test_a_replicated_base_is_whole_and_its_adapters_are_cut(folder: Path) -> None:
    for (rank,) in run_ranks(held, 2, folder, 1, [{"layout": Layout(replicated=True)}]):
        assert {trains for _, _, trains in rank.values()} == {True, False}
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


def kinds(folder: Path, cases: list[tuple[int, dict[str, Any]]]) -> list[tuple[str, str]]:
    """What serves as embedding and as head, for each limit and mode."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for limit, mode in cases:
        vocab_parallel.LARGE_BYTES = limit
        model = load_model(folder, mesh=mesh, device="cpu", **mode)
        embedding, head = model.model.embed_tokens, model.lm_head
        found.append((type(embedding).__name__.removeprefix("FSDP"), type(head).__name__.removeprefix("FSDP")))
    return found


def test_a_large_frozen_vocabulary_is_split(folder: Path) -> None:
    size, trains = 97 * 192 * 2, {"lora": LoRAConfig(r=4, modules_to_save=["embed_tokens"])}
    split, whole = ("VocabParallelEmbedding", "VocabParallelHead"), ("Embedding", "Head")
    cases = {
        "large": (size - 1, {}, split),
        "small": (size, {}, whole),
        "replicated": (0, {"layout": Layout(replicated=True)}, whole),
        "trained": (0, trains, whole),
    }
    for found in run_ranks(kinds, 2, folder, [(limit, mode) for limit, mode, _ in cases.values()]):
        assert dict(zip(cases, found, strict=True)) == {name: expected for name, (_, _, expected) in cases.items()}


def test_ranks_that_cannot_be_divided_are_told() -> None:
    world = World(0, 6, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="--dp-replicate 4 does not divide the 6 ranks"):
        mesh_of(world, 4)


def test_contradictions_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="either replicated"):
        Layout(replicated=True, on_host=True)
    with pytest.raises(ValueError, match="full or offloaded of all layers, got selective"):
        load_model(folder, device="cpu", layout=Layout(on_host=True), activation_checkpointing="selective")
