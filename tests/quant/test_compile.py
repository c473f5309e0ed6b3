"""A whole QLoRA layer compiles without a graph break, forward and backward, to the same results."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsharded.checkpoint import load_model
from qsharded.checkpoint.adapter import trainable
from qsharded.distributed.choose_layout import Layout
from qsharded.models.attention_inputs import AttentionInputs, attention_inputs
from qsharded.models.decoder import DecoderLayer
from qsharded.nn import LoRAConfig
from qsharded.quant.packed_weight import PackedWeight
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_compiles_with_fullgraph(tmp_path: Path, masked: bool) -> None:
    folder = write_checkpoint(tmp_path, hidden_size=192, num_attention_heads=6)
    model = load_model(folder, lora=LoRAConfig(r=4), dtype=torch.float32)
    layer = model.model.layers[0]
    with torch.no_grad():
        for name, parameter in trainable(model):
            if "lora_B" in name:
                parameter.fill_(0.01)
    documents = torch.tensor([[0] * 4 + [1] * 6]) if masked else None
    inputs = attention_inputs(model.config, torch.arange(10)[None], torch.float32, documents_BT=documents)[0]
    x = torch.randn(2, 10, 192)
    composition = partial(DecoderLayer.forward, layer)
    compiled = torch.compile(composition, fullgraph=True, backend="aot_eager")
    written, fused, by_compiler = (results(layer, forward, x, inputs) for forward in (composition, layer, compiled))
    assert len(written[2]) == 14
    torch.testing.assert_close(by_compiler, written, rtol=1e-5, atol=1e-5)
    # sums in another order; without an adapter, a norm or a rotation the difference is thousands of times that
    assert_close_by_norm(fused, written, 1e-5)
    layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(layer, layer, x, inputs), written, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("made_while_compiling", [PackedWeight])
def test_constructors_have_no_object_as_default(made_while_compiling: type) -> None:
    """torch.compile of torch 2.11 refuses a constructor with one, given or not."""
    defaults = made_while_compiling.__init__.__defaults__ or ()  # type: ignore[misc]
    assert all(isinstance(value, int | float | str | None) for value in defaults)


Results = tuple[Tensor, Tensor, dict[str, Tensor]]


def results(layer: DecoderLayer, forward: Callable[..., Tensor], x: Tensor, inputs: AttentionInputs) -> Results:
    """The output, and the gradients by the input and by what trains."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = forward(leaf, inputs)
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    return y.detach(), leaf.grad, gradients


def assert_close_by_norm(found: Results, expected: Results, tolerance: float) -> None:
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def tensors(values: Results) -> list[Tensor]:
    return [*values[:2], *values[2].values()]


def test_a_model_that_streams_its_weights_can_be_compiled(tmp_path: Path) -> None:
    """Where the compiler has to stand aside it does: copies from the host, a split vocabulary, inputs on the host."""
    folder = write_checkpoint(tmp_path)
    model = load_model(
        folder,
        lora=LoRAConfig(r=4),
        dtype=torch.float32,
        device="cpu",
        layout=Layout(on_host=True),
        activation_checkpointing="offloaded",
    )
    ids, results = torch.arange(24).view(2, 12), []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = forward(ids, targets_BS=ids)
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for _, parameter in trainable(model)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
