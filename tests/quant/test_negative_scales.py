"""Scales below zero, as calibration chooses them, through everything that reads absmax: ours and bitsandbytes'."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qsharded.integrations.bitsandbytes import convert_bitsandbytes, to_bitsandbytes
from qsharded.nn import LoRALinear, PackedLinear
from qsharded.quant import backends, blockwise8, formats, ops, own_kernels
from qsharded.quant.pack_weight import double_quantize
from qsharded.quant.packed_weight import PackedWeight
from qsharded_kernels import triton_absmax, triton_nf4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TRITON = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there
devices = pytest.mark.parametrize("device", DEVICES)
N, K = 80, 320  # five blocks a row: second-level blocks straddle rows, and rows are padded


def signed_scales() -> Tensor:
    """fp32 [N, G], half of them negative."""
    generator = torch.Generator().manual_seed(0)
    sizes = 0.02 + 0.1 * torch.rand(N, K // 64, generator=generator)
    return sizes * torch.where(torch.rand(N, K // 64, generator=generator) < 0.5, -1.0, 1.0)


def packed(device: str, *, nested: bool = True) -> PackedWeight:
    codes = torch.randint(256, (N, K // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)
    scales = signed_scales().to(device)
    if not nested:
        return PackedWeight(codes, scales, None, None, formats.NF4_64)
    return PackedWeight(codes, *double_quantize(scales), formats.NF4_64)


def exact(weight: PackedWeight) -> Tensor:
    """The weight in fp32 on the CPU, each number looked up and multiplied by itself."""
    codes, scales = weight.codes.cpu(), weight.decoded_absmax().cpu()
    values = formats.codebook()[torch.stack([codes >> 4, codes & 15], dim=2).flatten(1).long()]
    assert (scales < 0).float().mean() > 0.3
    return values * scales.repeat_interleave(64, dim=1)


@devices
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantizing(device: str, nested: bool, dtype: torch.dtype) -> None:
    weight = packed(device, nested=nested)
    expected = exact(weight).to(dtype)
    for found in (ops.nf4_dequantize(weight, dtype), backends.dequantize_by_reference(weight, dtype)):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dequantizing_in_triton() -> None:
    weight = packed(TRITON)
    found = triton_nf4.dequantize(*weight.tensors, *own_kernels.tables(weight), torch.float32)
    assert torch.equal(found.cpu(), exact(weight))


@devices
def test_double_quantization_keeps_their_signs(device: str) -> None:
    scales = signed_scales().to(device)
    found = double_quantize(scales)
    for one, reference in zip(found, formats.double_quantize(signed_scales()), strict=True):
        assert torch.equal(one.cpu(), reference)
    decoded = formats.dequantize_absmax(*found)
    assert torch.equal(decoded.sign(), scales.sign())
    assert (decoded - scales).abs().max() < 0.01 * scales.abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_double_quantization_in_triton() -> None:
    scales = signed_scales().to(TRITON)
    found = triton_absmax.double_quantize(scales, blockwise8.thresholds(True, scales.device))
    for one, reference in zip(found, formats.double_quantize(signed_scales()), strict=True):
        assert torch.equal(one.cpu(), reference)


@devices
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_products_fused_and_not(device: str, tokens: int) -> None:
    """On a GPU one token and eight go through the fused kernels, which round the codebook to x's dtype."""
    weight = packed(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = x.double() @ exact(weight).double().T
    found = ops.nf4_linear(x.to(device), weight).cpu().double()
    assert (found - expected).norm() < (1e-2 if device == "cuda" else 1e-6) * expected.norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_fused_product_in_triton() -> None:
    weight = packed(TRITON)
    x = torch.randn(8, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = x.double() @ exact(weight).double().T
    found = own_kernels.triton_linear(x.to(TRITON), weight, None).cpu().double()
    assert (found - expected).norm() < 1e-2 * expected.norm()


def layer(device: str) -> PackedLinear:
    made = PackedLinear(K, N, bias=False, device=device)
    made._hold(packed(device))
    return made


@devices
def test_an_adapted_layer_forward_and_backward(device: str) -> None:
    adapted = LoRALinear(layer(device), r=4, scaling=2.0, dropout=0.0, dtype=torch.float32)
    nn.init.normal_(adapted.lora_B.weight, std=0.1)
    x = torch.randn(6, K, device=device, requires_grad=True)
    adapted(x).square().sum().backward()
    own = x.detach().cpu().requires_grad_()
    whole = exact(packed(device)) + adapted.delta_weight().detach().cpu()
    (own @ whole.T).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.cpu(), own.grad, rtol=1e-3, atol=1e-3)


@devices
def test_bitsandbytes_computes_with_them_as_we_do(device: str) -> None:
    """Its own operations decode our layer with no difference; and it comes back byte for byte."""
    import bitsandbytes

    model = nn.Sequential(layer(device))
    expected = exact(packed(device))
    theirs = to_bitsandbytes(model, torch.float32)
    state = theirs[0].weight.quant_state
    decoded = bitsandbytes.functional.dequantize_4bit(theirs[0].weight.data, state)
    assert torch.equal(decoded.reshape(N, K).float().cpu(), expected)
    for tokens in (1, 6):  # its kernel for one token, and decoding first
        x = torch.randn(tokens, K, device=device)
        torch.testing.assert_close(theirs[0](x).cpu(), x.cpu() @ expected.T, rtol=1e-3, atol=1e-3)
    back = convert_bitsandbytes(theirs)[0]
    for name, tensor in layer(device).state_dict().items():
        assert torch.equal(tensor.flatten().view(torch.uint8), back.state_dict()[name].flatten().view(torch.uint8))


def test_a_checkpoint_of_them_loads_from_both_forms(tmp_path: Path) -> None:
    from qsharded import quantize
    from qsharded.checkpoint import load_model
    from tests.checkpoints import write_chat_checkpoint, write_chat_rows

    (tmp_path / "model").mkdir()
    model = write_chat_checkpoint(tmp_path / "model")
    rows = write_chat_rows(tmp_path / "rows.jsonl", 30)
    found = []
    for form in ("qsharded", "bitsandbytes"):
        flags = ["--calibrate", str(rows), "--calibrate-rows", "4", "--calibrate-length", "32", "--format", form]
        quantize.main(["--model", str(model), "--output", str(tmp_path / form), *flags])
        loaded = load_model(tmp_path / form, dtype=torch.float32, device="cpu")
        found.append(loaded.get_submodule("model.layers.1.mlp.down_proj"))
    assert all(isinstance(one, PackedLinear) for one in found)
    assert (found[0].packed().decoded_absmax() < 0).any()
    assert torch.equal(found[0].dequantize(), found[1].dequantize())
