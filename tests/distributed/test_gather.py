"""The trap that damages packed weights under FSDP2, and that ours survives it.

On CUDA, ``torch._foreach_copy_`` sends bf16 through fp32 and rewrites NaN patterns. gloo on a CPU does not show it, so
these tests put a copy in its place that does.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from qsharded import parallel
from tests.distributed.harness import run_ranks

ALL_PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).reshape(512, 256)


def as_cuda_copies(targets: list[Tensor], sources: list[Tensor], non_blocking: bool = False) -> None:
    """What the CUDA kernel does: bf16 goes through fp32, on whose way back every NaN becomes one and the same."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source.float().bfloat16() if source.dtype == torch.bfloat16 else source)


class Packed(nn.Module):
    """A frozen bf16 parameter made of bytes, beside a trainable companion, that reports the bytes its forward saw."""

    def __init__(self, rows: int, companion: torch.dtype | None) -> None:
        super().__init__()
        self.bytes = ALL_PATTERNS[-rows:].clone()
        self.packed = nn.Parameter(self.bytes.view(torch.bfloat16), requires_grad=False)
        self.companion = nn.Parameter(torch.zeros(8, 8, dtype=companion)) if companion else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.packed.view(torch.uint8).clone()
        return (x if self.companion is None else x @ self.companion.to(x.dtype)), seen


def damaged_bytes(
    rows: int,
    companion: torch.dtype | None,
    param_dtype: torch.dtype | None,
    offload: bool,
    reshard: bool,
    exact: bool,
    compile_it: bool,
) -> int:
    """How many bytes differ over two forward-backward rounds on this rank."""
    torch._foreach_copy_ = as_cuda_copies
    model = Packed(rows, companion)
    expected = model.bytes
    fully_shard(
        model,
        mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype),
        offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
        reshard_after_forward=reshard,
    )
    if exact:
        parallel.use_exact_gather(model)
    forward: Callable = torch.compile(model, backend="aot_eager") if compile_it else model
    damage = 0
    for _ in range(2):
        x = torch.randn(4, 8, dtype=param_dtype or companion, requires_grad=True)
        y, seen = forward(x)
        y.sum().backward()
        damage += int((seen != expected).sum())
    return damage


def test_the_emulated_copy_changes_the_patterns_that_cuda_changes() -> None:
    source = ALL_PATTERNS.flatten().view(torch.bfloat16)
    target = torch.empty_like(source)
    as_cuda_copies([target], [source])
    changed = (target.view(torch.int16) != source.view(torch.int16)).sum()
    assert changed == 2 * 127 - 1  # every NaN pattern but the one that the others become


def test_plain_fsdp2_damages_packed_bytes() -> None:
    damage = run_ranks(damaged_bytes, 2, 512, torch.bfloat16, None, False, True, False, False)
    assert all(damage)


def every_mode(rows: int, compile_it: bool) -> dict[str, int]:
    """Damage in each combination of companion, param_dtype, offload and resharding."""
    return {
        f"{companion} {param_dtype} {offload=} {reshard=}": damaged_bytes(
            rows, companion, param_dtype, offload, reshard, True, compile_it
        )
        for companion in (None, torch.bfloat16, torch.float32)
        for param_dtype in (None, torch.bfloat16)
        for offload in (False, True)
        for reshard in (False, True)
        if not compile_it or (companion is torch.float32 and not offload)
    }


@pytest.mark.parametrize(("world_size", "rows"), [(1, 512), (2, 511), (2, 1), (3, 512)])
def test_exact_gather_keeps_every_pattern_in_every_mode(world_size: int, rows: int) -> None:
    for modes in run_ranks(every_mode, world_size, rows, False):
        assert modes == dict.fromkeys(modes, 0)


def test_exact_gather_keeps_every_pattern_compiled() -> None:
    for modes in run_ranks(every_mode, 2, 512, True):
        assert modes == dict.fromkeys(modes, 0)
        assert len(modes) == 4


def gather_without_the_mark() -> str:
    """What happens when PyTorch fills the buffer by other means than the copy-in that is known."""
    gather = parallel.ExactAllGather()
    buffer = gather.allocate((8,), dtype=torch.bfloat16, device=torch.device("cpu"))
    group = init_device_mesh("cpu", (2,)).get_group()
    try:
        gather(buffer, buffer[:4], group)
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_unknown_way_to_fill_the_buffer_stops_the_run() -> None:
    for message in run_ranks(gather_without_the_mark, 2):
        assert "may damage packed weights" in message


def test_only_parallel_calls_fully_shard() -> None:
    from pathlib import Path

    package = Path(parallel.__file__).parent
    callers = {path.name for path in package.rglob("*.py") if "fully_shard(" in path.read_text()}
    assert callers <= {"parallel.py"}
