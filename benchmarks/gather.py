"""Do packed bytes survive FSDP2 bit for bit? All 65,536 patterns, plain ``fully_shard`` against our gather.

    torchrun --standalone --nproc-per-node N -m benchmarks.gather [--record FILE]

Each rank compares what a forward saw with what was stored, over rows that divide evenly and unevenly, companions of
other dtypes in the group, mixed precision, CPU offload and resharding; with an even number of ranks also as HSDP of two
replicas; and once more for weights that stream from host memory. The exit status is 1 where ours changed a byte.
``--share-gpu`` puts all ranks on one GPU and gathers over gloo: the copies on the GPU are the same, only the wire
differs.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from benchmarks.record import environment, write
from qsharded.cli.command import join_world
from qsharded.distributed.cpu_offload import OffloadedWeights
from qsharded.distributed.exact_all_gather import use_exact_gather
from qsharded.distributed.placement import materialize
from qsharded.models.activation_checkpointing import recomputed
from qsharded.utils.sharding import local, own_rows

ALL_PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).reshape(512, 256)
MODES: dict[str, tuple[Any, ...]] = {
    "rows": (512, 511, 1),
    "companion": (None, torch.bfloat16, torch.float32),
    "param_dtype": (None, torch.bfloat16),
    "offload": (False, True),
    "reshard": (True, False),
}


class Packed(nn.Module):
    """A frozen bf16 parameter made of bytes, beside a trainable companion, that reports the bytes its forward saw."""

    def __init__(self, rows: int, companion: torch.dtype | None, device: torch.device) -> None:
        super().__init__()
        self.expected = ALL_PATTERNS[-rows:].to(device)
        self.packed = nn.Parameter(self.expected.clone().view(torch.bfloat16), requires_grad=False)
        trained = torch.zeros(8, 8, dtype=companion, device=device) if companion else None
        self.companion = nn.Parameter(trained) if trained is not None else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.packed.view(torch.uint8).clone()
        return (x if self.companion is None else x @ self.companion.to(x.dtype)), seen


def damaged_bytes(
    *,
    rows: int,
    companion: torch.dtype | None,
    param_dtype: torch.dtype | None,
    offload: bool,
    reshard: bool,
    exact: bool,
    replicas: int = 1,
    compiler: str | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """How many bytes differ on this rank over two forward-backward rounds."""
    device = torch.device(device)
    model = Packed(rows, companion, device)
    expected = model.expected
    fully_shard(
        model,
        mesh=mesh_of_all(device, replicas),
        mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        reshard_after_forward=reshard,
    )
    if exact:
        use_exact_gather(model)
    forward = torch.compile(model, backend=compiler) if compiler else model
    damage = 0
    for _ in range(2):
        x = torch.randn(4, 8, dtype=param_dtype or companion, device=device, requires_grad=True)
        y, seen = forward(x)
        y.sum().backward()
        damage += int((seen != expected).sum())
    return damage


@functools.cache  # a mesh of two dimensions makes groups of its own, which hold memory
def mesh_of_all(device: torch.device, replicas: int) -> DeviceMesh:
    ranks = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


class Watched(Packed):
    """Counts what its forwards saw changed, the recomputed ones too."""

    damaged = forwards = 0

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # layers that are chained give one tensor
        # first of all: a recomputation ends with the last tensor that backward needs
        self.damaged += int((self.packed.view(torch.uint8) != self.expected).sum())
        self.forwards += 1
        return super().forward(x)[0]


def streamed_damage(*, rows: int, replicas: int = 1, device: torch.device | str = "cpu") -> int:
    """The same over three layers whose frozen rows wait in host memory (on one rank: all of them)."""
    device = torch.device(device)
    mesh = mesh_of_all(device, replicas) if dist.get_world_size() > 1 else None
    layers = [Watched(rows, torch.float32, torch.device("meta")) for _ in range(3)]
    weights = OffloadedWeights(layers, mesh)
    forwards = recomputed(weights.forwards, "full")
    materialize(nn.ModuleList(layers), device, set(weights.parameters()))
    for layer in layers:
        layer.expected = ALL_PATTERNS[-rows:].to(device)
        own = own_rows(layer.packed)
        stored = local(layer.packed).detach()
        stored.view(torch.uint8).copy_(layer.expected[own.start : own.stop])
        assert layer.companion is not None
        nn.init.eye_(layer.companion)
    for _ in range(2):
        x = torch.randn(4, 8, device=device, requires_grad=True)
        for forward in forwards:
            x = forward(x)
        x.sum().backward()
    assert all(layer.forwards == 4 for layer in layers)
    return sum(layer.damaged for layer in layers)


def every_mode(*, exact: bool, device: torch.device | str) -> dict[str, int]:
    """Bytes changed in each of the 72 modes, twice as many where HSDP is possible, on the rank where most were."""
    axes = MODES | {"replicas": (1, 2) if dist.get_world_size() % 2 == 0 else (1,)}
    changed = {}
    for values in itertools.product(*axes.values()):
        mode: dict[str, Any] = dict(zip(axes, values, strict=True))
        changed[" ".join(f"{key}={value}" for key, value in mode.items())] = worst(
            damaged_bytes(**mode, exact=exact, device=device)
        )
    return changed


def worst(count: int) -> int:
    """The largest of the ranks' counts."""
    largest = torch.tensor(count)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on the first GPU, over gloo")
    arguments = parser.parse_args()
    device = start(arguments.share_gpu)
    plain, exact = every_mode(exact=False, device=device), every_mode(exact=True, device=device)
    streamed = {f"rows={rows}": worst(streamed_damage(rows=rows, device=device)) for rows in MODES["rows"]}
    record = environment() | {
        "command": " ".join(["torchrun -m benchmarks.gather", *sys.argv[1:]]),
        "ranks": dist.get_world_size(),
        "wire": "gloo" if arguments.share_gpu or device.type == "cpu" else "nccl",
        "patterns": 65536,
        "modes": len(exact),
        "plain_fully_shard": summary(plain),
        "exact_gather": summary(exact),
        "streamed_from_host": summary(streamed),
    }
    if dist.get_rank() == 0:
        print(json.dumps(record, indent=2))
        if arguments.record:
            write(arguments.record, record)
    dist.destroy_process_group()
    sys.exit(any(exact.values()) or any(streamed.values()))


def start(share_gpu: bool) -> torch.device:
    """Join the process group; the device of this rank."""
    if not share_gpu:
        world = join_world("benchmarks.gather")
        if world.mesh is None:
            dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo")
        return world.device
    dist.init_process_group("gloo")
    return torch.device("cuda", 0)


def summary(changed: dict[str, int]) -> dict[str, Any]:
    damaged = {mode: count for mode, count in changed.items() if count}
    return {"modes_damaged": len(damaged), "worst_bytes": max(changed.values()), "damaged": sorted(damaged)[:4]}


if __name__ == "__main__":
    main()
