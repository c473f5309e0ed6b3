"""What each mode computes again in backward, and that it changes no result."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsharded.checkpoint import load_model
from qsharded.checkpoint.pack import quantize_checkpoint
from qsharded.fused.projections import Projection
from qsharded.models import CausalLM, activation_checkpointing
from qsharded.models.activation_checkpointing import Mode, recomputed
from qsharded.nn import LoRAConfig, PackedLinear
from qsharded.plan.simulation import LiveBytes
from qsharded.quant import backends
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.utils.checkpointing_modes import KEEP_ALL, Checkpointing
from tests.checkpoints import write_checkpoint


def packed_model(tmp_path: Path, kind: QuantFormat, mode: Mode | Checkpointing, dropout: float) -> CausalLM:
    """Two decoder layers of 7 packed linear layers, of which three are adapted; a decoder layer's last one is not."""
    original, folder = write_checkpoint(tmp_path), tmp_path / "packed"
    folder.mkdir(parents=True)
    quantize_checkpoint(original, folder, "qsharded", torch.device("cpu"), kind)
    lora = LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=dropout)
    return load_model(folder, lora=lora, dtype=torch.float32, device="cpu", activation_checkpointing=mode)


@pytest.mark.parametrize(
    ("mode", "again"),
    [("none", ""), ("selective", "gate up"), ("full", "q k v o gate up"), ("offloaded", "q k v o gate up")],
)
@pytest.mark.parametrize("kind", [NF4_64, QuantFormat("fp4", 32)], ids=str)
def test_what_a_fused_block_computes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: QuantFormat, mode: Mode, again: str
) -> None:
    """Each product dequantizes its weight, so that is counted. Nothing reads what down_proj puts out."""
    model = packed_model(tmp_path, kind, mode, dropout=0.0)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    names = {layer.packed().codes.data_ptr(): name for name, layer in layers.items()}
    put_weight, dequantized = Projection.put_weight, Counter()

    def counted(self: Projection, out: Tensor) -> None:
        dequantized[names[self.packed.codes.data_ptr()]] += 1
        put_weight(self, out)

    monkeypatch.setattr(Projection, "put_weight", counted)
    loss = model(torch.arange(24).view(2, 12), targets_BS=torch.arange(24).view(2, 12))
    assert dequantized == dict.fromkeys(layers, 1)
    dequantized.clear()
    loss.backward()
    for name in layers:
        layer, _, projection = re.match(r"model\.layers\.(\d)\.(self_attn|mlp)\.(\w+)_proj", name).groups()
        gives_input_gradient = not (layer == "0" and projection in ("q", "k", "v"))  # the embedding does not train
        assert dequantized[name] == gives_input_gradient + (projection in again.split()), name


@pytest.mark.parametrize("mode", ["full", "offloaded"])
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "composed"])
def test_of_a_mixed_model_the_first_blocks_alone_are_computed_again(tmp_path: Path, mode: Mode, dropout: float) -> None:
    """By what the graph holds: a layer that is computed again keeps its input, or not even that."""
    ids = torch.arange(24).view(2, 12)
    for number in range(3):
        (tmp_path / str(number)).mkdir()
    models = [
        packed_model(tmp_path / str(number), NF4_64, checkpointing, dropout)
        for number, checkpointing in enumerate((Checkpointing(mode, 1), Checkpointing(mode, 2), KEEP_ALL))
    ]
    held = [saved_bytes(model, ids) for model in models]
    assert held[1] < held[0] < held[2]
    gradients = [gradients_of(model, ids) for model in models]
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others, rtol=0, atol=0)


def saved_bytes(model: CausalLM, ids: Tensor) -> int:
    """What is alive from the forward to the backward."""
    torch.manual_seed(0)
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        loss = model(ids, targets_BS=ids)
        held = live.now()
    loss.detach_()
    return held


def gradients_of(model: CausalLM, ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model(ids, targets_BS=ids).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("mode", "again"),
    # 2 decoder layers of 7 packed linear layers
    [("none", 0), ("selective", 0), ("full", 2 * 7), ("offloaded", 2 * 7)],
)
@pytest.mark.parametrize("kind", [NF4_64, QuantFormat("fp4", 32)], ids=str)
def test_what_a_block_that_cannot_be_fused_computes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: QuantFormat, mode: Mode, again: int
) -> None:
    model = packed_model(tmp_path, kind, mode, dropout=0.1)
    linear, calls = backends.linear, []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return linear(*args)

    monkeypatch.setattr(backends, "linear", counted)
    loss = model(torch.arange(24).view(2, 12), targets_BS=torch.arange(24).view(2, 12))
    assert len(calls) == 2 * 7
    loss.backward()
    assert len(calls) == 2 * 7 + again


def squaring(weight: Tensor, seen: list[Tensor]) -> Any:
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        seen.append(x)
        return (x * weight * factor).square()

    return forward


def test_offloaded_inputs_are_those_of_the_forward() -> None:
    """Two micro-batches, whose backwards come after both forwards: every layer gets its own input again."""
    weights = [nn.Parameter(torch.rand(3) + 0.5) for _ in range(3)]
    seen: list[Tensor] = []
    forwards = recomputed([squaring(weight, seen) for weight in weights], "offloaded")
    outputs = []
    for seed in range(2):
        x = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for forward in forwards:
            x = forward(x, torch.tensor(1.5))
        outputs.append(x)
    given = [x.detach().clone() for x in seen]
    for output in reversed(outputs):
        output.sum().backward()
    again = seen[6:]
    assert len(again) == 6
    for order, x in zip((5, 4, 3, 2, 1, 0), again, strict=True):
        assert torch.equal(x, given[order])
    expected = plain_gradients(weights)
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.equal(weight.grad, gradient)


def plain_gradients(weights: list[nn.Parameter]) -> list[Tensor]:
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    for seed in (1, 0):
        x = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
        for copy in copies:
            x = (x * copy * torch.tensor(1.5)).square()
        x.sum().backward()
    return [copy.grad for copy in copies]


@pytest.mark.parametrize("mode", ["selective", "full", "offloaded"])
def test_a_checkpoint_is_told_whose_random_numbers_to_draw_again(monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    """PyTorch restores the state of those devices alone on which it finds tensors among the arguments."""
    told: list[list[str]] = []

    def checkpoint_that_tells(forward: Any, *args: Any, **options: Any) -> Tensor:
        told.append([arg.device.type for arg in args if isinstance(arg, Tensor)])
        return checkpoint(forward, *args, **options)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", checkpoint_that_tells)
    (forward,) = recomputed([lambda x, inputs: F.dropout(x)], mode)
    forward(torch.empty(3, device="meta", requires_grad=True), None)
    assert told == [["meta"]]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["selective", "full", "offloaded"])
def test_dropout_on_a_gpu_is_drawn_again_alike(mode: Mode) -> None:
    (forward,) = recomputed([lambda x, inputs: F.dropout(x).square()], mode)
    x = torch.ones(1000, device="cuda", requires_grad=True)
    y = forward(x, None)
    y.sum().backward()
    assert torch.equal(x.grad > 0, y > 0)
