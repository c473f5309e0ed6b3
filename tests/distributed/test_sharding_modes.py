"""Training goes alike in every mode: the same losses and the same adapter as one process without any of them."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.data import Cursor, Example, StepLoader
from qsharded.distributed import fsdp
from qsharded.distributed.choose_layout import Layout
from qsharded.distributed.world import World, mesh_of
from qsharded.models.generation import generate
from qsharded.nn import LoRAConfig
from qsharded.training import evaluation
from qsharded.training.gradient import accumulate_gradient
from qsharded.utils.sharding import whole
from tests.checkpoints import write_checkpoint
from tests.distributed.collective_dtypes import record_dtypes
from tests.distributed.harness import run_ranks

VOCAB = 97  # 2, 3 and 4 ranks share it unevenly, 3 ranks the 320 rows of the MLP too
STEPS, ROWS = 3, 24

Result = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A checkpoint with and one without a tied head."""
    return {
        tied: write_checkpoint(
            tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320, tie_word_embeddings=tied
        )
        for tied in (False, True)
    }


def examples() -> list[Example]:
    random = Random(5)
    lengths = [random.randint(3, 40) for _ in range(ROWS * STEPS)]
    return [Example([random.randrange(VOCAB) for _ in range(n)], [i >= n // 3 for i in range(n)]) for n in lengths]


def train(folder: Path, world_size: int, replicas: int, modes: list[dict[str, Any]]) -> list[Result]:
    """What becomes of a few steps of as many rows in all, in each of the modes."""
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    world = World(dist.get_rank(), world_size, torch.device("cpu"), mesh)
    sent = record_dtypes()
    return [_train(folder, world, replicas, {"lora": LoRAConfig(r=4)} | mode) | {"sent": sent} for mode in modes]


def _train(folder: Path, world: World, replicas: int, mode: dict[str, Any]) -> Result:
    mesh = mesh_of(world, replicas)
    model = load_model(folder, mesh=mesh, device="cpu", seed=3, **{"dtype": torch.float32} | mode)
    loader = StepLoader(
        examples(),
        max_length=64,
        packing=False,
        batch_size=2,
        accumulation=ROWS // 2 // world.size,
        rank=world.rank,
        world_size=world.size,
        seed=0,
        pad_id=0,
    )
    # AdamW would blow the last bits of a tiny gradient up to a step of full size
    rate = 1e-3 if model.config.tie_word_embeddings else 1.0  # an embedding's values make large logits
    optimizer = torch.optim.SGD([p for _, p in trainable(model)], lr=rate)
    losses = []
    for number, step in zip(range(STEPS), loader.steps(Cursor()), strict=False):
        sums = accumulate_gradient(model, step, world, seed=0, step_number=number)
        losses.append(evaluation.global_sum(sums.loss, world) / step.trained_tokens)
        optimizer.step()
        optimizer.zero_grad()
    said = generate(model, [[5, 6, 7], [9]], max_new_tokens=6, eos_ids=[])
    adapter = {n: whole(p.detach()) for n, p in trainable(model)}
    return {"losses": losses, "adapter": adapter, "said": said}


def recomputing(mode: str, **others: Any) -> dict[str, Any]:
    return {"activation_checkpointing": mode, **others}


SPLIT, REPLICATED, ON_HOST = Layout(vocab_parallel=True), Layout(replicated=True), Layout(on_host=True)
SAVES_HEAD = {"lora": LoRAConfig(r=4, modules_to_save=["lm_head"])}
ON_EMBEDDING = {"lora": LoRAConfig(r=3, target_modules=["v_proj", "embed_tokens"])}
TOLERANCES = {
    # sums in another order move losses by 3e-8 and an adapter by 8e-7
    torch.float32: (1e-6, 1e-5),
    # activations and the gradient of each micro-batch are rounded to 8 bits: losses move by 1e-4, an adapter by 0.012
    torch.bfloat16: (1e-3, 0.03),
}  # relative, of losses and of an adapter
BF16 = {"dtype": torch.bfloat16}  # as on GPUs: the adapters stay in fp32
OPTIONS = {"head": SAVES_HEAD, "embedding": ON_EMBEDDING, "tied embedding": ON_EMBEDDING, "bf16": BF16}


@pytest.fixture(scope="module")
def alone(folders: dict[bool, Path]) -> dict[Any, Result]:
    """What one process makes of it without any mode."""
    plain, head, embedding, bf16 = run_ranks(train, 1, folders[False], 1, 1, [{}, SAVES_HEAD, ON_EMBEDDING, BF16])[0]
    tied, tied_embedding = run_ranks(train, 1, folders[True], 1, 1, [{}, ON_EMBEDDING])[0]
    return {
        "plain": plain, "head": head, "tied": tied, "embedding": embedding, "tied embedding": tied_embedding,
        "bf16": bf16,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "world_size", "replicas", "modes"),
    [
        ("plain", 1, 1, [{}, recomputing("selective"), recomputing("full"), recomputing("offloaded")]),
        ("tied", 1, 1, [{"layout": SPLIT}, recomputing("full", layout=ON_HOST)]),
        ("plain", 2, 1, [{}, recomputing("selective"), recomputing("full", layout=REPLICATED)]),
        ("plain", 2, 1, [{"layout": SPLIT}, recomputing("offloaded", layout=ON_HOST)]),
        ("tied", 3, 1, [recomputing("full", layout=SPLIT), recomputing("full", layout=ON_HOST)]),
        ("tied", 3, 1, [{}]),
        ("plain", 2, 2, [{}]),  # every rank holds all
        ("tied", 4, 2, [{"layout": SPLIT}, recomputing("offloaded", layout=ON_HOST)]),
        ("bf16", 2, 1, [{}, recomputing("full"), {"layout": REPLICATED}]),
        ("bf16", 2, 1, [{"layout": SPLIT}, recomputing("offloaded", layout=ON_HOST)]),
        ("bf16", 2, 2, [{}]),
        # a head that trains is gathered, and so is the embedding beside it
        ("head", 2, 1, [{"layout": SPLIT}, recomputing("full", layout=ON_HOST), {"layout": REPLICATED}]),
        # an embedding under an adapter is split as any, and its adapter, of 3 rows, is gathered
        ("embedding", 2, 1, [{}, {"layout": REPLICATED}]),
        ("embedding", 2, 1, [{"layout": SPLIT}, recomputing("full", layout=ON_HOST)]),
        ("tied embedding", 2, 1, [{}]),
    ],
)
def test_training_goes_as_in_one_process(
    folders: dict[bool, Path],
    alone: dict[str, Result],
    model: str,
    world_size: int,
    replicas: int,
    modes: list[dict[str, Any]],
) -> None:
    expected = alone[model]
    assert all(parameter.norm() > 0 for parameter in expected["adapter"].values())  # lora_B begins at 0
    modes = [mode | OPTIONS.get(model, {}) for mode in modes]
    of_losses, of_adapter = TOLERANCES[torch.bfloat16 if model == "bf16" else torch.float32]
    for first, *others in run_ranks(train, world_size, folders["tied" in model], world_size, replicas, modes):
        assert first["losses"] == pytest.approx(expected["losses"], rel=of_losses)
        assert first["said"] == expected["said"]
        assert first["adapter"].keys() == expected["adapter"].keys()
        for name, parameter in expected["adapter"].items():
            assert (first["adapter"][name] - parameter).norm() / parameter.norm() < of_adapter, name
        if world_size > 1:
            assert first["sent"]["reduced"] == {torch.float32}
        if model == "bf16":
            assert_gathered_in_bf16(first["sent"]["gathered"], has_shards=world_size > replicas)
        assert {parameter.dtype for parameter in first["adapter"].values()} == {torch.float32}
        # where weights lie and what is computed again changes no sum at all
        for other in others:
            assert_same(other, first)


class Noting(nn.Module):
    """Notes what it is given, and in what its weight comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.seen: tuple[torch.dtype, torch.dtype] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.dtype, self.weight.dtype
        return x * self.weight


class InBlocks(nn.Module):
    """As much of a decoder as is sharded by name, with a parameter of its own for the root's group."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([Noting()]), "embed_tokens": Noting(), "norm": Noting()})
        self.lm_head = Noting()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model["norm"](self.model["layers"][0](self.model["embed_tokens"](x))))


def dtypes_seen(world_size: int) -> list[tuple[torch.dtype, torch.dtype] | None]:
    model = InBlocks()
    fsdp.shard(model, init_device_mesh("cpu", (world_size,)), param_dtype=torch.bfloat16)
    model(torch.ones(2, 4))
    return [module.seen for module in model.modules() if isinstance(module, Noting)]


def test_sharding_casts_parameters_and_no_inputs() -> None:
    """An fp32 table or mask would lose its bits on the way into each layer."""
    for seen in run_ranks(dtypes_seen, 2, 2):
        assert seen == [(torch.float32, torch.bfloat16)] * 4


def assert_gathered_in_bf16(gathered: set[torch.dtype], has_shards: bool) -> None:
    """The fp32 adapters too: left in fp32, they would be gathered at twice the size that computing needs."""
    assert gathered == ({torch.bfloat16} if has_shards else set())


def assert_same(one: Result, other: Result) -> None:
    assert (one["losses"], one["said"]) == (other["losses"], other["said"])
    for name, parameter in other["adapter"].items():
        assert torch.equal(one["adapter"][name], parameter), name
