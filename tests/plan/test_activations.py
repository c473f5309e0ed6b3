"""What a micro-batch keeps, against the sum of what each operation of a block saves for its backward.

Axes: B rows, S tokens, D hidden size, I intermediate size, H query heads, E head dim, V vocabulary, r rank.
"""

import dataclasses
from typing import Any

import pytest
import torch

from qsharded.checkpoint.load import skeleton
from qsharded.config import TrainConfig
from qsharded.models import ModelConfig
from qsharded.models.recompute import Mode, recomputed
from qsharded.nn import LoRAConfig
from qsharded.plan.activations import StepWork, step_work
from qsharded.plan.gpu_memory import plan
from qsharded.plan.simulation import LiveBytes, as_on_gpu
from tests.checkpoints import LLAMA

B, S, D, I, H, E, r = 3, 40, 128, 192, 4, 32, 5  # noqa: E741
MASK, TABLE = B * S * S, B * S * E * 2
LORA = LoRAConfig(r=r, target_modules=["q_proj"])


def work(*, checkpointing: Mode = "none", is_sharded: bool = True, **config: Any) -> StepWork:
    described = ModelConfig.from_hf(LLAMA | {"rope_theta": 1e4} | config)
    return step_work(
        described,
        LORA,
        torch.bfloat16,
        rows=B,
        length=S,
        checkpointing=checkpointing,
        is_sharded=is_sharded,
    )


def test_a_recomputed_block_keeps_its_output_alone() -> None:
    assert work(checkpointing="full").block.kept == B * S * D * 2


def test_a_block_keeps_what_its_operations_save() -> None:
    norms = 2 * B * S * 4  # one fp32 figure a row each
    adapter = B * S * D * 2 + B * S * r * 2  # q_proj's: the normalised input and the narrow product
    # q, k and v once for every query head, the output, the log-sum-exp, and the mask that was made additive
    # (the kernel keeps the log-sum-exp of 32 rows at a time, and a seed and an offset for its dropout)
    attention = 4 * B * H * S * E * 2 + B * H * 64 * 4 + 2 * 8 + MASK * 2
    residual = B * S * D * 2  # the second norm's input
    mlp = 3 * B * S * I * 2  # gate, silu(gate), up
    output = B * S * D * 2
    assert work().block.kept == norms + adapter + attention + residual + mlp + output


def test_what_is_dear_is_kept_by_selective_recomputation() -> None:
    """What the packed products put out, and attention with its log-sum-exp, seed and offset; beside the output."""
    packed = B * S * 2 * (2 * H * E + 2 * 2 * E + 2 * I + D)
    attention = B * S * H * E * 2 + B * H * 64 * 4 + 2 * 8
    assert work(checkpointing="selective").block.kept == packed + attention + B * S * D * 2


def test_masks_and_tables_are_shared_by_all_blocks() -> None:
    positions, embedded = B * S * 8, B * S * D * 2
    assert work().shared == positions + embedded + 2 * TABLE + MASK


def test_each_window_has_a_mask_of_its_own() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": None, **windows}
    assert work(**qwen).shared - work().shared == MASK


def test_recomputing_one_block_costs_what_it_does_not_keep() -> None:
    kept, recomputed = work().block, work(checkpointing="full").block
    assert recomputed.kept < kept.kept / 5
    assert abs((recomputed.kept + recomputed.passing) - (kept.kept + kept.passing)) <= B * S * D * 2


def test_the_largest_weight_is_decoded() -> None:
    assert work().block.decoded == I * D * 2


def test_the_loss_holds_a_chunk_of_logits_and_their_log_softmax() -> None:
    V, T = 50_000, B * S
    loss = work(vocab_size=V).loss
    logits = 2 * T * V * 4
    hidden = 3 * T * D * 2  # normalised, its gradient, and the input's
    assert logits < loss.kept + loss.passing < logits + hidden + 64 * T


def test_gradients_of_an_unsharded_model_are_there_already() -> None:
    """They are a class of their own, and the sum is formed in their place."""
    sharded, whole = work(), work(is_sharded=False)
    assert abs(whole.block.passing - sharded.block.passing) <= 2 * r * D * 4 + B * S * D * 2


@pytest.mark.parametrize(("on_host", "name"), [(False, "gather buffers"), (True, "weights from the host")])
def test_backward_holds_two_blocks_weights(on_host: bool, name: str) -> None:
    """The block that runs, and the next one's, which comes meanwhile."""
    config = TrainConfig(model="m", dataset="d", max_length=S, per_device_train_batch_size=B, cpu_offload=on_host)
    planned = plan(ModelConfig.from_hf(LLAMA), config, 2, lora=LORA)
    codes = (2 * D * D + 2 * D * (D // 2) + 3 * D * I) // 2  # q, o, k, v, and the MLP's; 4 bits a weight
    scales = (2 * D + 2 * (D // 2) + 2 * I) * 2 + D * 4  # bytes a row: 2 blocks, or 3 and one of padding
    norms = 2 * D * 2
    # lora_A's 5 rows are 3 on each of two ranks; what trains does not come from the host
    adapters = 0 if on_host else ((r + 1) + r) * D * 2
    found = sum(row.bytes for row in planned.rows if row.name == name and row.phases == ("backward of a block",))
    assert found == 2 * (codes + scales + norms + adapters)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_plan_adds_up_to_a_step_of_the_whole_model(checkpointing: Mode) -> None:
    """Four blocks, embedding and loss in one run, beside four times one block."""
    described = ModelConfig.from_hf(LLAMA | {"num_hidden_layers": 4})
    config = TrainConfig(
        model="m",
        dataset="d",
        max_length=S,
        per_device_train_batch_size=B,
        activation_checkpointing=checkpointing,
    )
    planned = plan(described, config, 1, lora=LORA)
    phase = planned.peak_phase
    passing = sum(row.bytes for row in planned.rows if phase in row.phases and "optimizer step" not in row.phases)
    hidden = B * S * D * 2
    assert 0 <= passing - peak_of_a_step(described, checkpointing) < 2 * hidden


def peak_of_a_step(described: ModelConfig, checkpointing: Mode) -> int:
    model = skeleton(described, dataclasses.replace(LORA), torch.bfloat16)
    for module in (*model.model.layers, model.model.norm):
        as_on_gpu(module)
    blocks = list(model.model.layers)
    for block, forward in zip(blocks, recomputed([block.forward for block in blocks], checkpointing), strict=True):
        block.forward = forward
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
    ids = torch.zeros(B, S, dtype=torch.int64, device="meta")
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, ids]) as live:
        model(ids, positions_BS=ids, document_ids_BS=ids, targets_BS=ids).backward()
    return live.peak
