"""What a micro-batch keeps, against the sum of what each operation of a layer saves for its backward.

Axes: B rows, S tokens, D hidden size, I intermediate size, H query heads, E head dim, V vocabulary, r rank.
"""

import dataclasses
from typing import Any

import pytest
import torch

from qsharded.checkpoint.load import skeleton
from qsharded.config import TrainConfig
from qsharded.fused.forwards import layer_forwards
from qsharded.models import ModelConfig
from qsharded.nn import LoRAConfig
from qsharded.plan.activations import StepWork, step_work
from qsharded.plan.run import plan
from qsharded.plan.simulation import LiveBytes, as_on_gpu
from qsharded.utils.checkpointing_modes import Checkpointing, Mode
from tests.checkpoints import LLAMA

B, S, D, I, H, E, r = 3, 40, 128, 192, 4, 32, 5  # noqa: E741
MASK, TABLE = B * S * S, B * S * E * 2
LORA = LoRAConfig(r=r, target_modules=["q_proj"])


OUTPUT = B * S * D * 2  # which is the next layer's input
# What a fused layer keeps of its adapters, whose ranks are rounded up to 8: x A^T, and A in 16 bits, padded.
ADAPTER = B * S * 8 * 2 + 8 * D * 2
ATTENTION = B * S * H * E * 2 + B * H * S * 4 + 2 * 8 + 8  # its output, log-sum-exp, seed and offset
QKV = B * S * (H + 2 * H // 2) * E * 2
BEFORE_A_NORM = B * S * D * 2 + B * S * 4  # and its rstd
H_AFTER_ATTENTION, GATE_UP = B * S * D * 2, B * S * 2 * I * 2
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def work(
    *,
    checkpointing: Mode = "none",
    is_sharded: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    **config: Any,
) -> StepWork:
    """With dropout a layer cannot be fused."""
    described = ModelConfig.from_hf(LLAMA | {"rope_theta": 1e4} | config)
    return step_work(
        described,
        dataclasses.replace(LORA, lora_dropout=dropout),
        dtype,
        rows=B,
        length=S,
        checkpointing=checkpointing,
        is_sharded=is_sharded,
    )


@pytest.mark.parametrize(
    ("checkpointing", "kept"),
    [
        ("none", QKV + ATTENTION + H_AFTER_ATTENTION + GATE_UP),
        ("selective", QKV + ATTENTION + H_AFTER_ATTENTION),
        ("full", 0),
        ("offloaded", 0),
    ],
)
def test_a_fused_block_keeps_what_its_backward_reads(checkpointing: Mode, kept: int) -> None:
    """Beside its output, and what is small of its adapters."""
    assert work(checkpointing=checkpointing).layer.kept == OUTPUT + ADAPTER + kept


@pytest.mark.parametrize(
    ("checkpointing", "kept"),
    [
        ("none", QKV + ATTENTION + H_AFTER_ATTENTION + GATE_UP + 2 * BEFORE_A_NORM),
        ("selective", QKV + ATTENTION + H_AFTER_ATTENTION + BEFORE_A_NORM),
        ("full", 0),
    ],
)
def test_norms_behind_attention_and_mlp_keep_their_inputs_too(checkpointing: Mode, kept: int) -> None:
    gemma = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
    found = work(checkpointing=checkpointing, head_dim=E, layer_types=["full_attention"] * 2, **gemma).layer.kept
    factors = (4 * D + 2 * E) * 4  # 1 + weight of each norm, in fp32
    assert found == OUTPUT + ADAPTER + factors + kept


@pytest.mark.parametrize(
    ("checkpointing", "kept"),
    [("selective", QKV + ATTENTION + BEFORE_A_NORM), ("full", 0), ("offloaded", 0)],
)
def test_a_layer_with_a_mixture_keeps_what_its_backward_reads(checkpointing: Mode, kept: int) -> None:
    """Its mixture is computed again, from an input that is made again too."""
    work(checkpointing="full", **MIXTRAL)  # makes the table of the 8-bit map, once for all
    assert work(checkpointing=checkpointing, **MIXTRAL).layer.kept == OUTPUT + ADAPTER + kept


def test_dropout_of_a_shared_expert_keeps_its_mask_behind_a_fused_half() -> None:
    glm = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "first_k_dense_replace": 0}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": I, "n_shared_experts": 1}
    described = ModelConfig.from_hf(LLAMA | glm | experts | {"n_group": 1, "topk_group": 1})

    def kept(dropout: float) -> int:
        lora = LoRAConfig(r=r, target_modules=["shared_experts.down_proj"], lora_dropout=dropout)
        how = {"rows": B, "length": S, "checkpointing": "none", "is_sharded": True}
        return step_work(described, lora, torch.bfloat16, **how).layer.kept

    kept(0.0)  # makes the table of the 8-bit map, once for all
    assert kept(0.1) - kept(0.0) == B * S * I  # a byte a value


def test_a_composed_block_keeps_what_its_operations_save() -> None:
    norms = 2 * B * S * 4  # one fp32 figure a row each
    # q_proj's: the normalised input as dropout leaves it, the mask of dropout, and the narrow product
    adapter = B * S * D * 2 + B * S * D + B * S * r * 2
    residual = B * S * D * 2  # the second norm's input
    mlp = 3 * B * S * I * 2  # gate, silu(gate), up
    assert work(dropout=0.1).layer.kept == norms + adapter + QKV + ATTENTION + residual + mlp + OUTPUT


def test_a_recomputed_composed_block_keeps_its_output_alone() -> None:
    assert work(checkpointing="full", dropout=0.1).layer.kept == OUTPUT


def test_what_is_dear_is_kept_by_selective_recomputation_of_a_composed_block() -> None:
    """What the packed products put out, and attention with its log-sum-exp, seed and offset; beside the output."""
    packed = B * S * 2 * (2 * H * E + 2 * 2 * E + 2 * I + D)
    assert work(checkpointing="selective", dropout=0.1).layer.kept == packed + ATTENTION + OUTPUT


def test_what_lies_between_blocks_is_one_blocks_output() -> None:
    assert work().boundary == work(dropout=0.1).boundary == OUTPUT


def test_tables_are_shared_by_all_blocks_and_no_mask_is_made() -> None:
    positions, embedded = B * S * 8, B * S * D * 2
    assert work().shared == positions + embedded + 2 * TABLE
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": None, **windows}
    assert work(**qwen).shared == work().shared


def test_in_fp32_each_window_has_a_mask_of_its_own() -> None:
    """No kernel takes documents in fp32, and masked attention holds no scores either."""
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": None, **windows}
    assert work(dtype=torch.float32).shared == B * S * 8 + 2 * (B * S * D * 2 + 2 * TABLE) + MASK
    assert work(dtype=torch.float32, **qwen).shared - work(dtype=torch.float32).shared == MASK


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_scores_are_held(dropout: float, dtype: torch.dtype) -> None:
    """With a head of 2 dimensions they would be most of what a layer takes."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    described = ModelConfig.from_hf(LLAMA | shape)
    of_row = step_work(
        described,
        dataclasses.replace(LORA, lora_dropout=dropout),
        dtype,
        rows=1,
        length=2048,
        checkpointing="full",
        is_sharded=True,
    )
    assert of_row.layer.passing < 8 * 2048 * 2048 * dtype.itemsize


def test_recomputing_one_block_costs_what_it_does_not_keep() -> None:
    kept, recomputed = work().layer, work(checkpointing="full").layer
    assert recomputed.kept < kept.kept / 5
    assert abs((recomputed.kept + recomputed.passing) - (kept.kept + kept.passing)) <= B * S * D * 2


def test_gate_and_up_are_dequantized_together() -> None:
    """A fused layer multiplies by both at once: with few tokens and a wide MLP that is most of its work."""
    wide = 2**14
    weight = 2 * wide * D * 2
    passing = work(intermediate_size=wide).layer.passing
    activations = B * S * (2 * 2 * wide + wide) * 2  # gate and up and their product, and what a product puts out
    assert weight <= passing <= weight + activations


def test_the_loss_holds_a_chunk_of_logits_which_become_their_gradient() -> None:
    V, T = 50_000, B * S
    loss = work(vocab_size=V).loss
    logits = T * V * 2
    hidden = 3 * T * D * 2  # normalised, its gradient, and the input's
    assert logits < loss.kept + loss.passing < logits + hidden + 64 * T


def test_gradients_of_an_unsharded_model_are_there_already() -> None:
    """They are a class of their own, and the sum is formed in their place."""
    sharded, whole = work(), work(is_sharded=False)
    assert abs(whole.layer.passing - sharded.layer.passing) <= 2 * r * D * 4 + B * S * D * 2


@pytest.mark.parametrize(("on_host", "name"), [(False, "gather buffers"), (True, "weights from the host")])
def test_backward_holds_two_blocks_weights(on_host: bool, name: str) -> None:
    """The layer that runs, and the next one's, which comes meanwhile."""
    config = TrainConfig(model="m", dataset="d", max_length=S, per_device_train_batch_size=B, cpu_offload=on_host)
    planned = plan(ModelConfig.from_hf(LLAMA), config, 2, lora=LORA)
    codes = (2 * D * D + 2 * D * (D // 2) + 3 * D * I) // 2  # q, o, k, v, and the MLP's; 4 bits a weight
    scales = (2 * D + 2 * (D // 2) + 2 * I) * 2 + D * 4  # bytes a row: 2 blocks, or 3 and one of padding
    norms = 2 * D * 2
    # lora_A's 5 rows are 3 on each of two ranks; what trains does not come from the host
    adapters = 0 if on_host else ((r + 1) + r) * D * 2
    found = sum(row.bytes for row in planned.rows if row.name == name and row.phases == ("backward of a layer",))
    assert found == 2 * (codes + scales + norms + adapters)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "composed"])
@pytest.mark.parametrize("checkpointed_layers", [None, 1, 3])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_plan_adds_up_to_a_step_of_the_whole_model(
    checkpointing: Mode, checkpointed_layers: int | None, dropout: float
) -> None:
    """Four layers, embedding and loss in one run, beside four times one layer."""
    if checkpointing == "none" and checkpointed_layers:
        pytest.skip("nothing is checkpointed")
    described = ModelConfig.from_hf(LLAMA | {"num_hidden_layers": 4})
    lora = dataclasses.replace(LORA, lora_dropout=dropout)
    assert_a_plan_adds_up(described, lora, checkpointing, checkpointed_layers)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_plan_of_mixtures_adds_up_to_a_step_of_the_whole_model(checkpointing: Mode) -> None:
    assert_a_plan_adds_up(ModelConfig.from_hf(LLAMA | MIXTRAL | {"num_hidden_layers": 4}), LORA, checkpointing, None)


def assert_a_plan_adds_up(
    described: ModelConfig, lora: LoRAConfig, checkpointing: Mode, checkpointed_layers: int | None
) -> None:
    config = TrainConfig(
        model="m",
        dataset="d",
        max_length=S,
        per_device_train_batch_size=B,
        activation_checkpointing=checkpointing,
        checkpointed_layers=checkpointed_layers,
    )
    planned = plan(described, config, 1, lora=lora)
    phase = planned.peak_phase
    passing = sum(row.bytes for row in planned.rows if phase in row.phases and "optimizer step" not in row.phases)
    hidden = B * S * D * 2
    assert 0 <= passing - peak_of_a_step(described, lora, config.checkpointing) < 2 * hidden


def peak_of_a_step(described: ModelConfig, lora: LoRAConfig, checkpointing: Checkpointing) -> int:
    model = skeleton(described, lora, torch.bfloat16)
    layers = list(model.model.layers)
    for module in (*layers, *(layer.mlp for layer in layers), model.model.norm):
        as_on_gpu(module)
    forwards = layer_forwards(layers, [layer.forward for layer in layers], checkpointing)
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
    ids = torch.zeros(B, S, dtype=torch.int64, device="meta")
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, ids]) as live:
        model(ids, positions_BS=ids, targets_BS=ids).backward()
    return live.peak
