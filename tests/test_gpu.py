"""The GPU against the CPU: the same bytes, and results within bf16's rounding. Run with ``-m gpu`` on a GPU machine."""

from pathlib import Path

import pytest
import torch

from qsharded.checkpoint import load_model
from qsharded.nn import LoRAConfig, PackedLinear
from qsharded.quant import formats
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.gpu

SHAPES = [(1, 64), (7, 576), (1000, 2880), (4096, 4096)]


def weight(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator) * 0.02
    values[0, :64] = 0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_bytes_are_those_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    linear.weight.data = weight(*shape, dtype)
    on_cpu, on_gpu = PackedLinear.from_linear(linear), PackedLinear.from_linear(linear.cuda())
    for found, expected in zip(on_gpu.packed().tensors, on_cpu.packed().tensors, strict=True):
        assert torch.equal(found.cpu(), expected)
    for out in formats.FLOAT_DTYPES:
        dequantized = formats.quantize(weight(*shape, dtype)).dequantize(out)
        assert torch.equal(on_gpu.dequantize(out).cpu(), dequantized)


def test_forward_and_gradient_are_those_of_the_cpu() -> None:
    linear = torch.nn.Linear(576, 1000, bias=True)
    on_cpu = PackedLinear.from_linear(linear)
    on_gpu = PackedLinear.from_linear(linear.cuda())
    x = torch.randn(3, 5, 576)
    results = []
    for layer, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        leaf = x.clone().to(device).requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y.detach().cpu(), leaf.grad.cpu()))
    # fp32 products, whose sums differ in order alone (PyTorch keeps TF32 off by default)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def test_a_model_loads_to_the_same_bytes_and_gives_the_same_loss(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, hidden_size=192, intermediate_size=320)
    lora = LoRAConfig(r=4)
    models = [load_model(folder, lora=lora, dtype=torch.float32, device=device) for device in ("cpu", "cuda")]
    on_cpu, on_gpu = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in models)
    for name, expected in on_cpu.items():
        assert torch.equal(as_bytes(on_gpu[name]), as_bytes(expected)), name
    ids = torch.arange(40).view(2, 20)
    losses = [model(ids.to(d), targets_BS=ids.to(d)).item() for model, d in zip(models, ("cpu", "cuda"), strict=True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
