"""The trap that damages packed weights under FSDP2, and that ours survives it.

On CUDA, ``torch._foreach_copy_`` sends bf16 through fp32 and rewrites NaN patterns. gloo on a CPU does not show it;
the copy that all ranks have in its place does.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.gather import damaged_bytes, streamed_damage
from qsharded.distributed import fsdp
from qsharded.distributed.exact_all_gather import ExactAllGather
from tests.distributed.harness import run_ranks


def damage(modes: list[dict[str, Any]]) -> list[int]:
    """What each mode changes."""
    return [damaged_bytes(**mode) for mode in modes]


def modes(rows: int, **fixed: Any) -> list[dict[str, Any]]:
    """Every combination of companion, param_dtype, offload and resharding that ``fixed`` leaves open."""
    free = {
        "companion": (None, torch.bfloat16, torch.float32),
        "param_dtype": (None, torch.bfloat16),
        "offload": (False, True),
        "reshard": (False, True),
    }
    axes = {key: (fixed[key],) if key in fixed else values for key, values in free.items()}
    rest = {key: value for key, value in fixed.items() if key not in free}
    return [dict(zip(axes, values, strict=True)) | rest | {"rows": rows} for values in product(*axes.values())]


def test_plain_fsdp2_damages_packed_bytes() -> None:
    plain = modes(512, exact=False, companion=torch.bfloat16, param_dtype=None, offload=False)
    assert len(plain) == 2
    assert all(all(rank) for rank in run_ranks(damage, 2, plain))


@pytest.mark.parametrize(("world_size", "rows"), [(1, 512), (2, 511), (2, 1), (3, 512)])
def test_exact_gather_keeps_every_pattern_in_every_mode(world_size: int, rows: int) -> None:
    for changed in run_ranks(damage, world_size, modes(rows, exact=True)):
        assert changed == [0] * 24


@pytest.mark.parametrize(("world_size", "rows", "replicas"), [(4, 5, 1), (2, 512, 2), (4, 511, 2), (4, 1, 2)])
def test_exact_gather_keeps_every_pattern_on_four_ranks_and_replicated(
    world_size: int, rows: int, replicas: int
) -> None:
    mixed = modes(rows, exact=True, replicas=replicas, companion=torch.float32)
    for changed in run_ranks(damage, world_size, mixed):
        assert changed == [0] * 8


def streamed(cases: list[dict[str, int]]) -> list[int]:
    return [streamed_damage(**case) for case in cases]


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_weights_from_host_memory_keep_every_pattern(world_size: int, replicas: int) -> None:
    for changed in run_ranks(streamed, world_size, [{"rows": rows, "replicas": replicas} for rows in (512, 511, 2, 1)]):
        assert changed == [0] * 4


@pytest.mark.parametrize("replicas", [1, 2])
def test_exact_gather_keeps_every_pattern_compiled(replicas: int) -> None:
    compiled = modes(512, exact=True, compiler="aot_eager", companion=torch.float32, offload=False, replicas=replicas)
    for changed in run_ranks(damage, 2, compiled):
        assert changed == [0] * 4


def gather_without_the_mark() -> str:
    """What happens when PyTorch fills the buffer by other means than the copy-in that is known."""
    gather = ExactAllGather()
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
    package = Path(fsdp.__file__).parent
    callers = {path.name for path in package.rglob("*.py") if "fully_shard(" in path.read_text()}
    assert callers <= {"parallel.py"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_param_dtype_that_would_cast_packed_bytes_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="param_dtype must be None or bfloat16"):
        fsdp.shard(torch.nn.Module(), param_dtype=dtype)
