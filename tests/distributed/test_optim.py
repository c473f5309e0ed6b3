"""PagedAdamW8bit over ranks: the updates of one process, and state that moves between numbers of ranks."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from qsharded.optim import PagedAdamW8bit
from qsharded.optim.state import merged
from qsharded.utils.sharding import local, own_rows
from tests.distributed.harness import run_ranks
from tests.kernels.cases import assert_same_bits

# rows of whole blocks; rows that end within blocks, unevenly; fewer rows than ranks; a small parameter
SHAPES = [(40, 256), (31, 200), (1, 5000), (9,)]
WHOLE_BLOCKS = (0, 2)


def whole(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(tensor: Tensor, layout: str | None) -> Tensor:
    """On one process the tensor itself, else sharded over all ranks or, with "hsdp", over pairs of them.

    Under "gpu" the shards lie there, and are made without a collective, of which gloo has few for GPUs.
    """
    if layout is None:
        return tensor
    size = dist.get_world_size()
    if layout == "gpu":
        mesh, shard = init_device_mesh("cuda", (size,)), placed(tensor, "fsdp").to_local().cuda()
        return DTensor.from_local(shard, mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())
    if layout == "hsdp":
        return distribute_tensor(tensor, init_device_mesh("cpu", (size // 2, 2)), [Replicate(), Shard(0)])
    return distribute_tensor(tensor, init_device_mesh("cpu", (size,)), [Shard(0)])


def optimizer_of(layout: str | None, **options: Any) -> PagedAdamW8bit:
    held = [nn.Parameter(placed(whole(shape, 0), layout)) for shape in SHAPES]
    return PagedAdamW8bit(held, lr=1e-2, **options)


def take_steps(optimizer: PagedAdamW8bit, layout: str | None, steps: range, bad_step: int = -1) -> None:
    for step in steps:
        for parameter, shape in zip(optimizer.param_groups[0]["params"], SHAPES, strict=True):
            parameter.grad = placed(whole(shape, 1 + step), layout)
            if step == bad_step and dist.get_rank() == dist.get_world_size() - 1:
                local(parameter.grad).fill_(torch.nan)
        optimizer.step()


def gathered(optimizer: PagedAdamW8bit) -> list[Tensor]:
    held = optimizer.param_groups[0]["params"]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in held]


def sharded_run(layout: str, options: dict[str, Any], bad_step: int) -> tuple[list[Tensor], dict[str, Any], int]:
    optimizer = optimizer_of(layout, **options)
    take_steps(optimizer, layout, range(4), bad_step)
    return gathered(optimizer), optimizer.state_dict(), int(optimizer.skipped_steps)


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 4)])
def test_ranks_take_the_steps_of_one_process(layout: str, ranks: int) -> None:
    one = optimizer_of(None)
    take_steps(one, None, range(4))
    results = run_ranks(sharded_run, ranks, layout, {"page_budget": 0, "bucket_bytes": 5000}, -1)
    joined_state = merged([state for _, state, _ in results])["state"]
    for number, parameter in enumerate(one.param_groups[0]["params"]):
        state = one.state[parameter]
        for held, _, _ in results:
            if number in WHOLE_BLOCKS or "absmax1" not in state:
                assert_same_bits(held[number], parameter.detach())
            else:
                # a block on the border of two ranks has a scale on each
                apart = (held[number] != parameter).float().mean()
                assert 0 < apart < 256 * (ranks - 1) / parameter.numel() + 0.01
        if number in WHOLE_BLOCKS:
            for name in ("state1", "absmax1", "state2", "absmax2"):
                assert_same_bits(joined_state[number][name].view(-1), state[name].view(-1))


def gpu_run(options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any], int]:
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    optimizer = optimizer_of("gpu", **options)
    take_steps(optimizer, "gpu", range(4), bad_step=1)
    shards = [local(parameter).detach().cpu() for parameter in optimizer.param_groups[0]["params"]]
    states = optimizer.state_dict()["state"]
    on_cpu = {number: {k: _on_cpu(v) for k, v in state.items()} for number, state in states.items()}
    return shards, {"state": on_cpu, "param_groups": []}, int(optimizer.skipped_steps)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"page_budget": 0, "bucket_bytes": 5000}], ids=["resident", "paged"])
def test_ranks_on_gpus_take_the_steps_of_one_process_on_a_cpu(options: dict[str, Any]) -> None:
    one = optimizer_of(None)
    take_steps(one, None, range(1))
    take_steps(one, None, range(2, 4))  # the second step has a bad gradient
    results = run_ranks(gpu_run, 2, options)
    joined_state = merged([state for _, state, _ in results])["state"]
    assert [skipped for _, _, skipped in results] == [1, 1]
    for number in WHOLE_BLOCKS:
        parameter = one.param_groups[0]["params"][number]
        assert_same_bits(torch.cat([shards[number] for shards, _, _ in results]), parameter.detach())
        for name in ("state1", "absmax1", "state2", "absmax2"):
            assert_same_bits(joined_state[number][name].view(-1), one.state[parameter][name].view(-1))


def test_a_rank_with_a_bad_gradient_has_all_skip() -> None:
    one = optimizer_of(None)
    take_steps(one, None, range(1))
    take_steps(one, None, range(2, 4))
    for held, _, skipped in run_ranks(sharded_run, 2, "fsdp", {}, 1):
        assert skipped == 1
        for number in WHOLE_BLOCKS:
            assert_same_bits(held[number], one.param_groups[0]["params"][number].detach())


class Written(NamedTuple):
    """Rows of a parameter in a checkpoint, as the optimizer takes them."""

    start: int
    stop: int
    tensors: dict[str, Tensor]


def two_ranks() -> tuple[list[Written], dict[str, Any]]:
    """This rank's state in both forms."""
    optimizer = optimizer_of("fsdp")
    take_steps(optimizer, "fsdp", range(2))
    held = optimizer.param_groups[0]["params"]
    rows = [own_rows(p) for p in held]
    written = [Written(r.start, r.stop, optimizer.parameter_state(p)) for p, r in zip(held, rows, strict=True)]
    return written, optimizer.state_dict()


def resumed(
    by_rank: list[list[Written]], state_dicts: list[dict[str, Any]], layout: str | None
) -> list[dict[int, Any]]:
    """What two ways of loading the same state hold on this rank."""
    by_rows, by_dict = optimizer_of(layout), optimizer_of(layout)
    for number, parameter in enumerate(by_rows.param_groups[0]["params"]):
        by_rows.set_parameter_state(parameter, [written[number] for written in by_rank])
    by_dict.load_state_dict(merged(state_dicts))
    states = [optimizer.state_dict()["state"] for optimizer in (by_rows, by_dict)]
    for optimizer in (by_rows, by_dict):
        take_steps(optimizer, layout, range(2, 3))
    assert all(map(torch.equal, gathered(by_rows), gathered(by_dict)))
    return states


def test_state_of_two_ranks_goes_on_with_three_and_one() -> None:
    written = run_ranks(two_ranks, 2)
    by_rank, state_dicts = [rows for rows, _ in written], [state for _, state in written]
    one = optimizer_of(None)
    take_steps(one, None, range(2))
    expected = one.state_dict()["state"]
    for results in (run_ranks(resumed, 3, by_rank, state_dicts, "fsdp"), [resumed(by_rank, state_dicts, None)]):
        for of_rows, of_dict in results:
            for number, state in of_rows.items():
                assert state["step"] == 2
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        assert_same_bits(value, of_dict[number][name])
        whole_again = merged([{"state": of_rows} for of_rows, _ in results])["state"]
        for number in WHOLE_BLOCKS:
            for name in ("state1", "absmax1", "state2", "absmax2"):
                assert_same_bits(whole_again[number][name].view(-1), expected[number][name].view(-1))
