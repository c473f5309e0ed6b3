"""The integrations on a GPU. Run with ``-m gpu`` on a machine that has one."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qsharded.integrations.transformers import QShardedConfig
from qsharded.nn import PackedLinear
from qsharded.quant import formats
from tests.checkpoints import write_checkpoint
from tests.models.architectures import write_architecture

bnb = pytest.importorskip("bitsandbytes")
from qsharded.integrations.bitsandbytes import convert_bitsandbytes, install, uninstall  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture
def weight() -> torch.Tensor:
    values = torch.randn(512, 576, generator=torch.Generator().manual_seed(0)) * 0.02
    values[3, :64] = 0
    return values.bfloat16()


@pytest.fixture
def installed():
    install()
    yield
    uninstall()


@pytest.mark.parametrize("model_type", ["llama", "olmoe", "gpt_oss"])
def test_a_model_is_quantized_on_the_gpu_to_the_bytes_of_the_cpu(model_type: str, tmp_path: Path) -> None:
    """A decoder; and mixtures of experts, apart and turned around."""
    if model_type == "llama":
        folder = write_checkpoint(tmp_path, hidden_size=192, intermediate_size=320)
    else:
        folder = write_architecture(tmp_path, model_type)
    on_gpu = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QShardedConfig())
    on_cpu = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QShardedConfig(), device_map={"": "cpu"})
    assert next(on_gpu.parameters()).is_cuda
    for (name, found), expected in zip(on_gpu.state_dict().items(), on_cpu.state_dict().values(), strict=True):
        assert torch.equal(found.cpu().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


def test_generating_compiled_with_a_static_cache_keeps_the_bytes_and_the_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, hidden_size=256, intermediate_size=512)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QShardedConfig())
    packed = {n: m.weight.view(torch.uint8).clone() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    ids = torch.arange(8, device="cuda").view(1, 8)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert plain.shape == static.shape
    assert all(torch.equal(model.get_submodule(n).weight.view(torch.uint8), before) for n, before in packed.items())


def test_quantizing_gives_the_bytes_of_bitsandbytes_on_the_cpu(installed: None, weight: torch.Tensor) -> None:
    quantize = torch.ops.bitsandbytes.quantize_4bit
    for found, expected in zip(
        quantize(weight.cuda(), 64, "nf4", torch.uint8), quantize(weight, 64, "nf4", torch.uint8), strict=True
    ):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_strided_weight_is_quantized_as_it_reads(installed: None, weight: torch.Tensor, storage: torch.dtype) -> None:
    wide = torch.cat([weight, weight], dim=1).cuda()
    for view in (wide[:, :576], weight.cuda().t(), wide.view(8, 64, 1152)[:, ::2]):
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit(view, 64, "nf4", storage)
        expected_codes, expected_absmax = formats.quantize_blocks(view.cpu().reshape(-1, 64))
        assert codes.dtype == storage
        assert torch.equal(codes.view(torch.uint8).cpu().view(-1), expected_codes.view(-1))
        assert torch.equal(absmax.cpu(), expected_absmax.view(-1))


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_pytorch_finds_nothing_wrong_with_the_operations(
    installed: None, weight: torch.Tensor, dtype: torch.dtype, storage: torch.dtype
) -> None:
    operations, weight, x = torch.ops.bitsandbytes, weight.cuda(), torch.randn(2, 1, 576, device="cuda", dtype=dtype)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    packed = [512, 576], state.absmax
    torch.library.opcheck(operations.dequantize_4bit.default, (codes, state.absmax, 64, "nf4", [512, 576], dtype))
    torch.library.opcheck(operations.gemm_4bit.default, (x, codes, *packed, 64, "nf4"))
    torch.library.opcheck(operations.gemv_4bit.default, (x[:1], codes.t(), *packed, state.code, 64))
    if storage == torch.uint8:  # else bitsandbytes' own description of the result has another size
        torch.library.opcheck(operations.quantize_4bit.default, (weight.to(dtype), 64, "nf4", storage))


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_dequantizing_is_exact(installed: None, weight: torch.Tensor, dtype: torch.dtype) -> None:
    packed = formats.quantize(weight, double_quant=False)
    codes, absmax = packed.codes.cuda().view(-1, 1), packed.absmax.cuda().flatten()
    found = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, 64, "nf4", [512, 576], dtype)
    assert torch.equal(found.cpu(), packed.dequantize(dtype))


@pytest.mark.parametrize("rows", [1, 8, 64, 300])
@pytest.mark.parametrize("nested", [True, False])
def test_products_are_those_of_the_dequantized_weight(weight: torch.Tensor, rows: int, nested: bool) -> None:
    layer = bnb.nn.Linear4bit(576, 512, True, torch.bfloat16, nested, "nf4")
    layer.weight = bnb.nn.Params4bit(weight, compress_statistics=nested, quant_type="nf4", module=layer)
    model = nn.Sequential(layer.cuda().bfloat16())
    x = torch.randn(rows, 576, device="cuda", dtype=torch.bfloat16)
    state = layer.weight.quant_state
    dequantized = bnb.functional.dequantize_4bit(layer.weight.data, state)
    expected = nn.functional.linear(x.float(), dequantized.float(), layer.bias.float())
    install()
    try:
        swapped = model(x)
    finally:
        uninstall()
    convert_bitsandbytes(model)
    assert torch.equal(model[0].dequantize(torch.bfloat16), dequantized)
    # bf16 keeps 8 bits of the result; the sums are in fp32
    for found in (swapped, model(x)):
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=5e-3)
