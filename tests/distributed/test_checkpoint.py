"""Checkpoints read by other numbers of ranks: uneven rows, empty shards, state in an optimizer's own form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.checkpoint.background_writer import CheckpointWriter
from qsharded.checkpoint.manifest import verify
from qsharded.checkpoint.resume import Progress, load_checkpoint, read_progress
from qsharded.checkpoint.training_state import Rows
from qsharded.distributed.world import World, start_world
from qsharded.nn import LoRAConfig
from qsharded.utils.seeds import derived_seed
from qsharded.utils.sharding import local, own_rows
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

# 1 row leaves a rank of two without any, 3 rows give one of two ranks more; the norms are vectors.
LORA = LoRAConfig(r=3, rank_pattern={"q_proj": 1}, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
WRITERS = ("fsdp1", "fsdp2", "hsdp2")


def whole(shape: Sequence[int], *seed: str) -> Tensor:
    """The values that a tensor of a checkpoint has, whoever holds which rows of it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(derived_seed(*seed)))


def own(parameter: Tensor, *seed: str) -> Tensor:
    rows = own_rows(parameter)
    return whole(parameter.shape, *seed)[rows.start : rows.stop]


class CodedOptimizer(Optimizer):
    """Keeps its state in a form of its own: bytes of all local elements in a row, so many to a scale."""

    BLOCK = 7

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.codes: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def encode(self, parameter: Tensor, values: Tensor) -> None:
        padded = nn.functional.pad(values.flatten(), (0, -values.numel() % self.BLOCK)).view(-1, self.BLOCK)
        scales = padded.abs().amax(1).clamp(min=1e-30)
        self.codes[parameter] = (padded / scales[:, None] * 127).round().to(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
        return (codes * (scales[:, None] / 127)).flatten()[: torch.Size(shape).numel()].view(*shape)

    def parameter_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        codes, scales = self.codes[parameter]
        return {"codes": codes, "scales": scales}

    def set_parameter_state(self, parameter: Tensor, written: Sequence[Rows]) -> None:
        rows, first, rest = own_rows(parameter), written[0].start, parameter.shape[1:]
        if [(run.start, run.stop) for run in written] == [(rows.start, rows.stop)]:
            self.codes[parameter] = written[0].tensors["codes"], written[0].tensors["scales"]
            return
        runs = [self.decode(r.tensors["codes"], r.tensors["scales"], (r.stop - r.start, *rest)) for r in written]
        self.encode(parameter, torch.cat(runs)[rows.start - first : rows.stop - first])


def start(folder: Path, layout: str) -> tuple[World, nn.Module, list[nn.Parameter]]:
    world = start_world()
    mesh = world.mesh
    if layout == "hsdp":  # each rank holds every row
        mesh = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard"))
    model = load_model(folder, mesh=mesh, lora=LORA, dtype=torch.float32)
    return world, model, [parameter for _, parameter in trainable(model)]


def write(folder: Path, layout: str) -> None:
    world, model, parameters = start(folder, layout)
    adamw, coded = AdamW(parameters), CodedOptimizer(parameters)
    for name, parameter in trainable(model):
        local(parameter.detach()).copy_(own(parameter, name))
        state = {what: torch.zeros_like(parameter) for what in ("exp_avg", "exp_avg_sq")}
        for what, value in state.items():
            local(value).copy_(own(parameter, name, what))
        adamw.state[parameter] = {"step": torch.tensor(5.0), **state}
        coded.encode(parameter, own(parameter, name, "coded"))
    for kind, optimizer in (("adamw", adamw), ("coded", coded)):
        with CheckpointWriter(folder / kind / f"{layout}{world.size}", world, None) as writer:
            writer.save(model, LORA, optimizer, Progress(step=5), base_model="base")
    world.barrier()  # the main rank completes them


def read(folder: Path, layout: str) -> None:
    """Hold what each number of ranks wrote against what it must be, on this number of ranks."""
    world, model, parameters = start(folder, layout)
    for written_by in WRITERS:
        for kind, optimizer in (("adamw", AdamW(parameters)), ("coded", CodedOptimizer(parameters))):
            for parameter in parameters:
                local(parameter.detach()).zero_()
            checkpoint = folder / kind / written_by / "checkpoints" / "step-000005"
            load_checkpoint(checkpoint, model, LORA, optimizer)
            assert read_progress(checkpoint) == Progress(step=5)
            for name, parameter in trainable(model):
                assert torch.equal(local(parameter), own(parameter, name))
                if kind == "adamw":
                    check_adamw(optimizer, name, parameter)
                else:
                    check_coded(optimizer, name, parameter, exact=written_by == f"{layout}{world.size}")


def check_adamw(optimizer: Optimizer, name: str, parameter: Tensor) -> None:
    state = optimizer.state[parameter]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(state["step"], torch.tensor(5.0))
    for what in ("exp_avg", "exp_avg_sq"):
        assert isinstance(state[what], DTensor) == isinstance(parameter, DTensor)
        assert torch.equal(local(state[what]), own(parameter, name, what))


def check_coded(optimizer: Any, name: str, parameter: Tensor, *, exact: bool) -> None:
    expected = own(parameter, name, "coded")
    found = optimizer.decode(*optimizer.codes[parameter], expected.shape)
    # Half a step of 1/127 of a block's largest for each of two encodings; these numbers stay below 5.
    torch.testing.assert_close(found, expected, rtol=0, atol=5 / 127)
    other = CodedOptimizer([parameter])
    other.encode(parameter, expected)
    assert not exact or all(map(torch.equal, optimizer.codes[parameter], other.codes[parameter]))


def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write(tmp_path, "fsdp")
    run_ranks(write_and_read, 2, tmp_path)
    run_ranks(read, 3, tmp_path, "fsdp")
    read(tmp_path, "fsdp")
    # Of two ranks that hold the same rows, one writes them.
    files = verify(tmp_path / "adamw" / "hsdp2" / "checkpoints" / "step-000005").files
    assert files["optimizer-00001-of-00002.safetensors"].size < 200


def write_and_read(folder: Path) -> None:
    for layout in ("fsdp", "hsdp"):
        write(folder, layout)
    for layout in ("fsdp", "hsdp"):
        read(folder, layout)
