"""The branches of CUDA that ranks take on a CPU: each must bite where a GPU would."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.gather import ALL_PATTERNS
from qsharded.distributed import fsdp, self_test
from qsharded.distributed.world import start_world
from tests.distributed import as_cuda
from tests.distributed.harness import run_ranks


def call_without_an_input() -> None:
    world = start_world()
    probe = fsdp.shard(self_test._Probe(world.device, torch.float32), world.mesh)
    probe()


def test_a_sharded_model_called_without_an_input_fails() -> None:
    """What stopped every run on two GPUs: the start-up probe had none."""
    with pytest.raises(AssertionError, match="IndexError: tuple index out of range"):
        run_ranks(call_without_an_input, 2)


class _Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        inputs.append(inputs[0])
        return self.linear(inputs[0])


def what_the_caller_sees_of_an_append() -> int:
    model = fully_shard(_Appends(), mesh=init_device_mesh("cpu", (2,)))
    inputs = [torch.ones(2, 4)]
    model(inputs)
    return len(inputs)


def test_a_sharded_model_gets_copies_of_its_lists() -> None:
    """On GPUs, what a forward appends to a list of the caller's is lost."""
    assert run_ranks(what_the_caller_sees_of_an_append, 2) == [1, 1]


def test_the_emulated_copy_changes_the_patterns_that_cuda_changes() -> None:
    source = ALL_PATTERNS.flatten().view(torch.bfloat16)
    target = torch.empty_like(source)
    as_cuda.foreach_copy_([target], [source])
    changed = (target.view(torch.int16) != source.view(torch.int16)).sum()
    assert changed == 2 * 127 - 1  # every NaN pattern but the one that the others become


def foreach_calls() -> list[str]:
    """The multi-tensor functions that a step of PyTorch's AdamW, clipped, goes through."""
    called: list[str] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with Recorder():
        nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.optim.AdamW([parameter]).step()
    return [name for name in called if name.startswith("_foreach_")]


def test_clipping_and_optimizers_treat_all_parameters_in_one_call() -> None:
    [called] = run_ranks(foreach_calls, 1)
    assert {"_foreach_norm", "_foreach_mul_", "_foreach_addcdiv_"} <= set(called)
    assert foreach_calls() != called  # on a CPU that is left as it is
