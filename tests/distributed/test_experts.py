"""Experts that ranks share: the bytes of one rank's on any number of them, and every bit pattern through the gather."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint import load_model
from qsharded.checkpoint.expert_fills import experts_in
from qsharded.utils.sharding import local
from tests.distributed.harness import run_ranks
from tests.models.parity import case, ids

PATTERNS = 1 << 16


def on_this_rank(checkpoint: Path) -> tuple[dict[str, Tensor], int]:
    """Bytes of the experts here, and how many patterns the gather changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = load_model(checkpoint, mesh=mesh, dtype=torch.bfloat16, device="cpu")
    return bytes_of(model), _changed_patterns(model)


def bytes_of(model: torch.nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, experts in experts_in(model):
        for part, tensor in (*experts.named_parameters(), *experts.named_buffers()):
            found[f"{name}.{part}"] = local(tensor).detach().contiguous().view(torch.uint8).clone()
    return found


@torch.no_grad()
def _changed_patterns(model: torch.nn.Module) -> int:
    """Each round another run of the patterns lies in the experts of the first layer."""
    layer = model.model.layers[0]
    experts, seen = layer.mlp.experts.gate_proj, list[Tensor]()
    layer.mlp.register_forward_pre_hook(lambda *_: seen.append(experts.weight.view(torch.int16).flatten().clone()))
    words, changed = experts.weight.numel(), 0
    own = local(experts.weight)
    first = sum(part.numel() for part in _parts_before(own))
    for start in range(0, PATTERNS, words):
        patterns = torch.arange(start, start + words).to(torch.int16)
        own.view(torch.int16).copy_(patterns[first : first + own.numel()].view(own.shape))
        model(ids())
        changed += int((seen.pop() != patterns).sum())
    return changed


def _parts_before(own: Tensor) -> list[Tensor]:
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, tuple(own.shape))
    return [torch.empty(shape, device="meta") for shape in rows[: dist.get_rank()]]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_hold_the_bytes_of_one_and_gather_every_pattern(ranks: int) -> None:
    checkpoint = case("qwen3_moe").checkpoint
    one = bytes_of(load_model(checkpoint, dtype=torch.bfloat16, device="cpu"))
    shards, changed = zip(*run_ranks(on_this_rank, ranks, checkpoint), strict=True)
    assert changed == (0,) * ranks
    for name, whole in one.items():
        parts = [shard[name] for shard in shards]
        if "_scales" in name or "_offset" in name:
            assert all(part.equal(whole) for part in parts)
        else:
            assert torch.cat(parts).equal(whole)
            assert 0 < parts[0].shape[0] < whole.shape[0]
