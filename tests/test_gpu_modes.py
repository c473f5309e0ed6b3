"""Recomputation and weights in host memory on a GPU, where copies run beside the compute: none may come too late."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.distributed.choose_layout import Layout
from qsharded.models import CausalLM
from qsharded.nn import LoRAConfig
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.gpu

LAYERS, WIDTH, ROWS, LENGTH = 12, 512, 4, 512
INPUT_BYTES = ROWS * LENGTH * WIDTH * 4
# q, k, v, o of 512, 256, 256, 512 x 512 and an MLP of 3 x 2048 x 512 weights, half a byte each
BLOCK_BYTES = (2 * 512 + 2 * 256 + 3 * 2048) * 512 // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("llama"),
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        max_position_embeddings=LENGTH,
        vocab_size=1000,
    )


def load(folder: Path, mode: dict[str, Any]) -> CausalLM:
    model = load_model(folder, lora=LoRAConfig(r=4), dtype=torch.float32, device="cuda", **mode)
    with torch.no_grad():  # with B at zero, A would have no gradient
        for name, parameter in trainable(model):
            if "lora_B" in name:
                parameter.fill_(0.01)
    return model


def batch(seed: int) -> Tensor:
    return torch.randint(1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)).cuda()


def losses_and_gradients(folder: Path, mode: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Four micro-batches without a stop between, so that the host runs ahead of the GPU."""
    model, batches = load(folder, mode), [batch(seed) for seed in range(4)]
    losses = []
    for ids in batches:
        loss = model(ids, targets_BS=ids) / ids.numel()
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: parameter.grad for name, parameter in trainable(model)}


OFFLOADED = {"activation_checkpointing": "offloaded"}
FULL = {"activation_checkpointing": "full"}
ON_HOST = {"layout": Layout(on_host=True)}


@pytest.mark.parametrize(
    "mode", [FULL, {"activation_checkpointing": "selective"}, OFFLOADED, FULL | ON_HOST, OFFLOADED | ON_HOST]
)
def test_no_mode_changes_a_result(folder: Path, mode: dict[str, Any]) -> None:
    expected_losses, expected = losses_and_gradients(folder, {})
    losses, gradients = losses_and_gradients(folder, mode)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        # fp32 sums in another order (attention's backward adds atomically)
        assert (gradients[name] - gradient).norm() / gradient.norm() < 1e-4, name


def test_weights_on_the_host_are_pinned_and_not_on_the_gpu(folder: Path) -> None:
    gc.collect()  # models refer to themselves in circles
    before = torch.cuda.memory_allocated()
    model = load(folder, FULL | ON_HOST)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and name != "model.norm.weight"}
    assert all(parameter.is_pinned() for parameter in frozen.values())
    trained = sum(parameter.nbytes for _, parameter in trainable(model))
    assert torch.cuda.memory_allocated() - before < trained + BLOCK_BYTES


def peak_of_a_step(folder: Path, mode: dict[str, Any]) -> int:
    """Bytes, beside what was there before the model came; of a second step, when all streams have been set up."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = load(folder, mode)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(batch(0), targets_BS=batch(0)).backward()
    return torch.cuda.max_memory_allocated() - before


def test_weights_come_two_blocks_at_a_time(folder: Path) -> None:
    resident, streamed = peak_of_a_step(folder, FULL), peak_of_a_step(folder, FULL | ON_HOST)
    assert resident - streamed > (LAYERS - 3) * BLOCK_BYTES


def test_offloaded_inputs_leave_the_gpu(folder: Path) -> None:
    kept, offloaded = peak_of_a_step(folder, FULL), peak_of_a_step(folder, OFFLOADED)
    assert kept - offloaded > (LAYERS - 4) * INPUT_BYTES
