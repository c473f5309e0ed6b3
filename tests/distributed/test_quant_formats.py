"""FP4 and other blocks in shards: the same bytes and the same training step on two ranks as on one."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from qsharded.checkpoint import load_model
from qsharded.nn import LoRAConfig, PackedLinear
from qsharded.utils.sharding import local
from tests.checkpoints import pack_by_bitsandbytes, write_checkpoint
from tests.distributed.harness import run_ranks
from tests.distributed.test_load import whole_bytes

IDS = torch.arange(24).view(2, 12) % 97


class Found(NamedTuple):
    """Of a model on one rank: every tensor whole, the losses of two steps, the codebook, the block size, and how many
    rows of k_proj are here."""

    state: dict[str, Tensor]
    losses: Tensor
    quant_type: str
    block_size: int
    rows: int


def trained(paths: list[Path], world_size: int) -> list[Found]:
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    lora = LoRAConfig(r=3)
    return [of_model(load_model(path, mesh=mesh, lora=lora, dtype=torch.float32, seed=7)) for path in paths]


def of_model(model: nn.Module) -> Found:
    state = {name: whole_bytes(tensor).clone() for name, tensor in model.named_parameters()}
    state |= {name: buffer.reshape(-1).view(torch.uint8) for name, buffer in model.named_buffers()}
    k_proj = model.get_submodule("model.layers.0.self_attn.k_proj.base_layer")
    assert isinstance(k_proj, PackedLinear)
    rows = local(k_proj.weight).shape[0]
    return Found(state, two_steps(model), k_proj.quant_type, k_proj.block_size, rows)


def two_steps(model: nn.Module) -> Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(IDS, targets_BS=IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Rows of 3 blocks, of 12, and of one of 4096."""
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    small = {"hidden_size": 384, "intermediate_size": 128, "num_key_value_heads": 1, "head_dim": 94}
    wide = {"hidden_size": 4096, "intermediate_size": 34, "num_attention_heads": 2, "num_key_value_heads": 1}
    small, wide = write_checkpoint(folders[0], **small), write_checkpoint(folders[1], **wide, head_dim=6)
    cases = [(small, "fp4", 128, True), (small, "nf4", 32, False), (wide, "fp4", 4096, True)]
    return [pack_by_bitsandbytes(case[0], case[0] / f"{number}", *case[1:]) for number, case in enumerate(cases)]


def test_two_ranks_load_and_train_as_one(packed: list[Path]) -> None:
    [alone] = run_ranks(trained, 1, packed, 1)
    assert [tuple(found[2:]) for found in alone] == [("fp4", 128, 94), ("nf4", 32, 94), ("fp4", 4096, 6)]
    assert all(found.losses[1] < found.losses[0] for found in alone)
    for rank in run_ranks(trained, 2, packed, 2):
        for found, wanted in zip(rank, alone, strict=True):
            assert found.state.keys() == wanted.state.keys()
            assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)
            torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-5, atol=0)
            assert found.rows == wanted.rows // 2
