"""Plans of models that transformers' code computes, from their own code on the meta device.

Axes: B rows, S tokens, D hidden size, L layers.
"""

from typing import Any

import pytest
import torch

from qsharded.checkpoint.load import skeleton
from qsharded.config import TrainConfig
from qsharded.models.choice import read_config
from qsharded.models.parts import layers_of
from qsharded.nn import LoRAConfig
from qsharded.plan import captured_layers
from qsharded.plan.activations import StepWork
from qsharded.plan.choose_checkpointing import choose_checkpointing
from qsharded.plan.gpu_memory import Planner
from qsharded.plan.parameters import CODES, UNPACKED
from qsharded.utils.checkpointing_modes import Mode
from tests.models.architectures import described_by

B, S, D = 2, 64, 64
LORA = LoRAConfig(r=4)
LORA_16 = LoRAConfig(r=4, dtype=torch.bfloat16)  # as they arrive where they are sharded
TRAINING = TrainConfig(model="x", dataset="x", max_length=S, per_device_train_batch_size=B)


def described(model_type: str, **config: Any) -> Any:
    return read_config(described_by(model_type, **config), "transformers")


def work(model_type: str, mode: Mode, **config: Any) -> StepWork:
    settings: dict[str, Any] = {"rows": B, "length": S, "checkpointing": mode, "is_sharded": True}
    return captured_layers.step_work(described(model_type, **config), LORA, torch.bfloat16, **settings)


@pytest.mark.parametrize("model_type", ["cohere2", "phi", "qwen3_moe", "llama4_text", "bamba"])
def test_a_layer_keeps_its_input_alone_where_it_is_checkpointed(model_type: str) -> None:
    """The next layer's: what a layer puts out."""
    kept = work(model_type, "full").layer.kept
    assert kept == B * S * D * 2
    assert work(model_type, "none").layer.kept > 5 * kept


def test_what_a_layer_keeps_is_what_autograd_saves_in_a_real_one() -> None:
    """On the CPU, where attention takes another kernel, with a figure less for each row of scores."""
    planned = work("starcoder2", "none").layer.kept
    assert planned == pytest.approx(saved_by_a_real_layer(described("starcoder2")), rel=0.02)


def saved_by_a_real_layer(config: Any) -> int:
    """Bytes of distinct storages, parameters left out, in the first of two layers; its output is among them."""
    model = skeleton(config, LORA_16, torch.bfloat16).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.zero_()
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    first, second = layers_of(model)
    plain = first.forward

    def watched(*args: Any, **named: Any) -> Any:
        inputs = {leaf.untyped_storage().data_ptr() for leaf in (*args, *named.get("position_embeddings", ()))}
        known.update(inputs)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return plain(args[0].requires_grad_(), *args[1:], **named)

    first.forward = watched
    second.forward = lambda x, *_, **__: x
    model(torch.zeros(B, S, dtype=torch.int64))
    own = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in known)
    return own + B * S * D * 2


def test_layers_of_each_kind_count_as_often_as_there_are_some() -> None:
    kinds = ["linear_attention", "full_attention"]
    linear, full = (work("qwen3_5_text", "none", layer_types=[kind] * 2).layer for kind in kinds)
    mixed = work("qwen3_5_text", "none", num_hidden_layers=4, layer_types=[kinds[0]] * 3 + kinds[1:]).layer
    assert linear.kept != full.kept
    assert mixed.kept == pytest.approx((3 * linear.kept + full.kept) / 4, abs=1)
    assert mixed.passing == max(linear.passing, full.passing)


def rows_of_plan(model_type: str) -> dict[str, int]:
    config = described(model_type)
    plan = Planner(config, LORA, torch.bfloat16, 80 << 30).plan(choose(config), 1)
    return {row.name: row.bytes for row in plan.rows}


def test_experts_of_a_known_layout_are_counted_as_packed() -> None:
    rows = rows_of_plan("mixtral")
    experts, attention = 2 * 4 * 3 * 64 * 128, 2 * 2 * (64 + 32) * 64  # layers, experts, matrices; q and o, k and v
    assert rows[CODES] == (experts + attention) // 2
    assert UNPACKED not in rows


def test_other_experts_are_counted_as_not_quantized() -> None:
    experts = 2 * 2 * 3 * 64 * 128 * 2  # layers, experts, matrices, two bytes a value
    routers = 2 * 2 * 64 * 2
    assert rows_of_plan("llama4_text")[UNPACKED] == experts + routers


def choose(config: Any) -> TrainConfig:
    return choose_checkpointing(Planner(config, LORA, torch.bfloat16, 80 << 30), TRAINING, 1)[0]


def test_a_model_that_cannot_be_planned_trains_with_full_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks_for_values(*_: Any, **__: Any) -> Any:
        return torch.zeros((), device="meta").item()

    config = described("helium")
    model = skeleton(config, LORA, torch.bfloat16)
    monkeypatch.setattr(type(next(layers_of(model))), "forward", asks_for_values)
    planner = Planner(config, LORA, torch.bfloat16, 80 << 30)
    chosen, line = choose_checkpointing(planner, TRAINING, 1)
    assert chosen.activation_checkpointing == "full"
    assert "full, as its memory cannot be planned: the model's code asks for values" in line
