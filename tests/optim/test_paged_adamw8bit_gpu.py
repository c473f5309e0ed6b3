"""PagedAdamW8bit on a GPU: bitsandbytes' codes, paging that changes no bit, no waiting, nothing left behind."""

import copy
import gc
import os
from ctypes import CDLL, byref, c_uint, c_uint64
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsharded.optim import PagedAdamW8bit
from qsharded.optim.arena import BLOCK_BYTES
from qsharded.optim.paging import IN_FLIGHT_BYTES
from tests.kernels.cases import assert_same_bits
from tests.optim import cases
from tests.optim.test_paged_adamw8bit import assert_same_training

pytestmark = pytest.mark.gpu

MIB = 2**20
PAGING: list[dict[str, Any]] = [
    {"page_budget": "max"},
    {"page_budget": "max", "bucket_bytes": 7 * BLOCK_BYTES},
    {"page_budget": 0, "bucket_bytes": 7 * BLOCK_BYTES},
    {"page_budget": 17 * BLOCK_BYTES, "bucket_bytes": 5 * BLOCK_BYTES},
]


def large_parameters(count: int = 16) -> list[nn.Parameter]:
    """2 MiB of 8-bit state each."""
    return [nn.Parameter(torch.randn(1024, 1024, device="cuda")) for _ in range(count)]


def set_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(1024, 1024, device="cuda").to(dtype) * 0.1)
    theirs, start = nn.Parameter(ours.detach().clone()), ours.detach().clone()
    one = PagedAdamW8bit([ours], lr=1e-3, weight_decay=0.01)
    other = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=0.01)
    for step in range(100):
        ours.grad = torch.randn_like(ours) * 0.01
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
        if step == 0:
            for name in ("state1", "state2"):
                apart = (one.state[ours][name].int() - other.state[theirs][name].int()).abs()
                assert (apart == 0).float().mean() >= 0.99, name
                assert apart.max() <= 1
    # the mean errors that bitsandbytes' own tests allow against fp32 moments
    assert (ours.float() - theirs.float()).abs().mean() < 0.0016
    assert (ours - start).float().abs().mean() > 0.003


@pytest.mark.parametrize("options", PAGING)
def test_paging_changes_no_bit(options: dict[str, Any]) -> None:
    def trained(**settings: Any) -> PagedAdamW8bit:
        held = [nn.Parameter(p.detach().cuda()) for seed in range(8) for p in cases.parameters(seed)]
        optimizer = PagedAdamW8bit(held, lr=1e-2, **settings)
        for step in range(6):
            if step % 2:
                optimizer.prefetch()
            cases.train(optimizer, 1, seed=step)
        return optimizer

    assert_same_training(trained(page_budget="none"), trained(**options))


@pytest.mark.parametrize("budget", ["none", "max", 0])
def test_a_step_waits_for_nothing(budget: Any) -> None:
    held = large_parameters(4)
    optimizer = PagedAdamW8bit(held, lr=torch.tensor(1e-3, device="cuda"), page_budget=budget, bucket_bytes=MIB)
    scale = torch.ones((), device="cuda")
    for _ in range(2):
        set_gradients(held)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            set_gradients(held)
            optimizer.prefetch()
            optimizer.step()
            optimizer.step(grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("budget", [0, 8 * MIB, "max"])
def test_the_device_holds_the_budget_and_two_buckets(budget: Any) -> None:
    held = large_parameters()
    set_gradients(held)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = PagedAdamW8bit(held, page_budget=budget, bucket_bytes=MIB)
    scale = torch.ones((), device="cuda")
    for _ in range(3):
        optimizer.step(grad_scale=scale)
    torch.cuda.synchronize()
    store = optimizer._store
    assert store is not None
    allowed = (IN_FLIGHT_BYTES if budget == "max" else budget) + 2 * MIB
    assert store.device_bytes <= allowed
    # beside it: a row number a block, and tables of a few entries a parameter
    assert torch.cuda.max_memory_allocated() - before <= allowed + 16 * 4096 * 4 + MIB // 4


def test_auto_pages_where_the_device_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.cuda.mem_get_info()[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(0.05 * total) + 10 * MIB, total))
    held = large_parameters()
    set_gradients(held)
    optimizer = PagedAdamW8bit(held, bucket_bytes=MIB)
    optimizer.step()
    assert optimizer._store is not None
    assert 0 < optimizer._store.host_bytes < 16 * 4096 * BLOCK_BYTES
    assert optimizer._store.device_bytes <= 12 * MIB


def is_locked(memory: Tensor) -> bool:
    """Whether the driver knows it as host memory. (``is_pinned`` of PyTorch 2.11 knows only what PyTorch pinned.)"""
    kind = c_uint()
    pointer_attribute_memory_type, host = 2, 1
    result = CDLL("libcuda.so.1").cuPointerGetAttribute(
        byref(kind), pointer_attribute_memory_type, c_uint64(memory.data_ptr())
    )
    return result == 0 and kind.value == host


def test_host_memory_is_locked_and_given_back() -> None:
    held = large_parameters(2)
    set_gradients(held)
    optimizer = PagedAdamW8bit(held, page_budget="max", bucket_bytes=MIB)
    optimizer.step()
    codes = optimizer.state[held[0]]["state1"]
    assert codes.device.type == "cpu"
    assert is_locked(codes)
    del optimizer
    gc.collect()
    assert not is_locked(codes)


def test_state_moves_with_its_parameters_and_survives_a_copy() -> None:
    here = PagedAdamW8bit(cases.parameters(), lr=1e-2)
    moving = copy.deepcopy(here)
    for optimizer in (here, moving):
        cases.train(optimizer, 2)
    for parameter in moving.param_groups[0]["params"]:
        parameter.data = parameter.data.cuda()
        parameter.grad = None
    cases.train(here, 2, seed=5)
    cases.train(moving, 2, seed=5)
    assert_same_training(here, moving)
    copied = copy.deepcopy(moving)
    for optimizer in (moving, copied):
        cases.train(optimizer, 1, seed=9)
    assert_same_training(moving, copied)


def test_a_gradient_that_is_not_finite_is_counted_on_the_device() -> None:
    held = large_parameters(2)
    before = [parameter.detach().clone() for parameter in held]
    optimizer = PagedAdamW8bit(held)
    set_gradients(held)
    held[1].grad[5, 7] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps.is_cuda
    assert optimizer.skipped_steps.item() == 1
    for parameter, value in zip(held, before, strict=True):
        assert_same_bits(parameter.detach(), value)


def memory() -> tuple[int, int, int]:
    """Bytes allocated and reserved on the device, and resident on the host."""
    torch.cuda.synchronize()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident


@pytest.mark.parametrize("budget", ["none", "max"])
def test_two_hundred_optimizers_leave_nothing(budget: Any) -> None:
    held = large_parameters(2)
    set_gradients(held)

    def cycle() -> None:
        optimizer = PagedAdamW8bit(held, page_budget=budget, bucket_bytes=MIB)
        optimizer.step()
        del optimizer
        gc.collect()

    for _ in range(3):
        cycle()
    allocated, reserved, resident = memory()
    for _ in range(200):
        cycle()
    assert memory()[0] == allocated
    # 200 times 4 MiB of state would be 800
    assert memory()[1] <= reserved + 64 * MIB
    assert memory()[2] <= resident + 200 * MIB
