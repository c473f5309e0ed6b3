"""Models of bitsandbytes become ours in place and back, and its operations run on our kernels."""

import copy
import tomllib
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qsharded
from qsharded.distributed import fsdp
from qsharded.integrations import bitsandbytes_kernels, entry
from qsharded.integrations.bitsandbytes import convert_bitsandbytes, install, to_bitsandbytes, uninstall
from qsharded.integrations.bitsandbytes_format import rows_as_parameters
from qsharded.nn import PackedLinear
from qsharded.quant import formats, ops
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks

X = torch.randn(5, 192, generator=torch.Generator().manual_seed(1))


def theirs(
    nested: bool,
    storage: torch.dtype = torch.uint8,
    kind: str = "nf4",
    columns: int = 192,
    rows: int = 75,
    block_size: int = 64,
) -> nn.Sequential:
    """A model of one layer, quantized by bitsandbytes; 192 columns make an odd number of blocks a row."""
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows)
    layer = bnb.nn.Linear4bit(columns, rows, True, torch.float32, nested, kind, storage)
    layer.load_state_dict(plain.state_dict())
    layer.weight.blocksize = block_size  # the layer has no argument for it
    return nn.Sequential(layer.to("cpu"))


def dequantized(layer: Any) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize(
    ("nested", "storage", "columns"), [*product([True, False], [torch.uint8, torch.bfloat16], [192, 128])]
)
def test_a_model_is_converted_and_back_with_its_bytes(nested: bool, storage: torch.dtype, columns: int) -> None:
    model = theirs(nested, storage, columns=columns)
    before, weight = dequantized(model[0]), model[0].weight
    convert_bitsandbytes(model)
    ours = model[0]
    assert isinstance(ours, PackedLinear)
    assert ours.weight.data_ptr() == weight.data_ptr()
    shared_absmax = ours.weight_absmax.data_ptr() == weight.quant_state.absmax.data_ptr()
    assert shared_absmax == (not nested or columns == 128)  # an odd number of bytes a row is padded
    assert torch.equal(ours.dequantize(torch.float32), before)
    to_bitsandbytes(model, torch.float32)
    assert model[0].weight.data_ptr() == weight.data_ptr()
    assert torch.equal(dequantized(model[0]), before)
    assert model[0].weight.quant_state.nested == nested


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("kind", "block_size", "columns"), [("fp4", 64, 192), ("nf4", 32, 96), ("fp4", 128, 128), ("nf4", 1024, 1024)]
)
def test_every_kind_is_converted_and_back_with_its_bytes(
    kind: str, block_size: int, columns: int, nested: bool
) -> None:
    model = theirs(nested, kind=kind, columns=columns, rows=7, block_size=block_size)
    before, stored = dequantized(model[0]), {name: value.clone() for name, value in model.state_dict().items()}
    address = model[0].weight.data_ptr()
    convert_bitsandbytes(model)
    assert (model[0].quant_type, model[0].block_size) == (kind, block_size)
    assert model[0].weight.data_ptr() == address
    assert torch.equal(model[0].dequantize(torch.float32), before)
    to_bitsandbytes(model, torch.float32)
    again = model.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert torch.equal(dequantized(model[0]), before)
    assert model[0].weight.blocksize == block_size


@pytest.mark.parametrize(("kind", "block_size"), [("nf4", 64), ("fp4", 64), ("fp4", 32), ("nf4", 32)])
def test_a_converted_layer_computes_what_it_did(kind: str, block_size: int) -> None:
    model = theirs(True, kind=kind, block_size=block_size).train()
    x = X.clone().requires_grad_()
    expected = model(x)
    [gradient] = torch.autograd.grad(expected.square().sum(), x)
    convert_bitsandbytes(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], gradient)


@pytest.mark.parametrize(("kind", "block_size"), [("nf4", 64), ("fp4", 64), ("nf4", 128)])
def test_a_layer_that_bitsandbytes_has_reordered_for_its_cpu_kernel_is_taken_as_it_saves_it(
    kind: str, block_size: int
) -> None:
    model = theirs(True, kind=kind, columns=128, rows=64, block_size=block_size)
    with torch.no_grad():
        model.eval()(X[:, :128])  # on a CPU with AVX-512 for bf16, this reorders, and rounds the absmax
    saved = copy.deepcopy(model)
    saved.state_dict()  # puts the layer into the order in which it is saved
    convert_bitsandbytes(model)
    assert torch.equal(model[0].dequantize(torch.float32), dequantized(saved[0]))


@pytest.mark.parametrize(("kind", "block_size"), [("nf4", 64), ("fp4", 32)])
def test_a_reordered_layer_whose_absmax_is_in_fp32_keeps_them_but_for_their_rounding(
    kind: str, block_size: int
) -> None:
    """bitsandbytes' own inverse leaves these transposed and in bf16."""
    model = theirs(False, kind=kind, columns=128, rows=64, block_size=block_size)
    layer, before = model[0], copy.deepcopy(model[0].weight.quant_state.absmax)
    codes, shape = layer.weight.data, (64, 128)
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        codes, layer.weight.quant_state
    )
    convert_bitsandbytes(model)
    rounded = before.bfloat16().float().view(64, -1)
    expected = formats.dequantize_blocks(
        codes.view(64, 64), rounded, torch.float32, formats.QuantFormat(kind, block_size)
    )
    assert torch.equal(model[0].dequantize(torch.float32), expected.view(shape))


def test_absmax_of_another_type_are_refused() -> None:
    codes = torch.zeros(64, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"w has its absmax in torch.bfloat16, must be uint8 or float32"):
        rows_as_parameters(codes, torch.ones(2).bfloat16(), (2, 64), formats.NF4_64, "w")


def test_back_and_forth_keeps_the_keys_of_a_bitsandbytes_checkpoint() -> None:
    model = theirs(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_bitsandbytes(convert_bitsandbytes(model), torch.float32)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def converted(folder: Path, shard: bool) -> torch.Tensor:
    """Logits of a model that bitsandbytes quantized and that became ours."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = convert_bitsandbytes(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
    if shard:
        fsdp.shard(model)
    return model(torch.arange(12).view(2, 6)).logits.detach()


def test_a_converted_model_is_sharded_bit_for_bit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, hidden_size=192, intermediate_size=320)
    expected = converted(folder, False)
    for logits in run_ranks(converted, 2, folder, True):
        assert torch.equal(logits, expected)


def test_what_cannot_be_held_is_refused_and_the_model_left_as_it_was() -> None:
    model = nn.Sequential(*theirs(True), *theirs(True, kind="fp4", block_size=128))
    with pytest.raises(
        ValueError, match=r"1: in_features = 192 is no multiple of its blocks of 128; .* leave this layer"
    ):
        convert_bitsandbytes(model)
    assert isinstance(model[0], bnb.nn.Linear4bit)
    with pytest.raises(ValueError, match="0 is not quantized yet"):
        convert_bitsandbytes(nn.Sequential(bnb.nn.Linear4bit(64, 8, quant_type="nf4")))
    with pytest.raises(ValueError, match="no layer of bitsandbytes in 4 bits"):
        convert_bitsandbytes(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="no PackedLinear"):
        to_bitsandbytes(nn.Sequential(nn.Linear(2, 2)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of our operations that were called."""
    seen: list[str] = []
    for name in ("nf4_quantize", "nf4_dequantize", "nf4_linear"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, f=function, **k: (seen.append(n), f(*a, **k))[1])
    yield seen
    uninstall()


CASES = [
    *product([(75, 192), (7, 64), (3, 5, 128), (100, 96), (4096,), (33, 31)], [32, 64, 128], ["nf4", "fp4"]),
    ((1, 64), 64, "nf4"),
]


@pytest.mark.parametrize(("shape", "blocksize", "kind"), CASES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_quantizing_gives_the_bytes_of_bitsandbytes(
    calls: list[str], shape: tuple[int, ...], blocksize: int, kind: str, storage: torch.dtype
) -> None:
    if torch.Size(shape).numel() % 4 and storage != torch.uint8:
        pytest.skip("bitsandbytes' own kernel fails")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight.view(-1)[: min(blocksize, 64)] = 0
    quantize = torch.ops.bitsandbytes.quantize_4bit
    expected = quantize(weight, blocksize, kind, storage)
    install()
    found = quantize(weight, blocksize, kind, storage)
    for tensor, other in zip(found, expected, strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
    ours = kind == "nf4" and blocksize == 64 and weight.numel() % 64 == 0
    assert calls == (["nf4_quantize"] if ours else [])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_bitsandbytes(calls: list[str], nested: bool, dtype: torch.dtype, bias: bool) -> None:
    layer = theirs(nested)[0].train()
    state, x = layer.weight.quant_state, X.to(dtype).view(1, 5, 192).requires_grad_()
    b = layer.bias.detach().to(dtype) if bias else None
    expected = bnb.matmul_4bit(x, layer.weight, state, bias=b)
    install()
    found = bnb.matmul_4bit(x, layer.weight, state, bias=b)
    assert torch.equal(found, expected)
    assert calls == ["nf4_linear"]


@pytest.mark.parametrize("nested", [True, False])
def test_pytorch_finds_nothing_wrong_with_the_replaced_operations(calls: list[str], nested: bool) -> None:
    """Schemas, what the fakes say of shapes and dtypes, no aliases of inputs."""
    layer = theirs(nested, columns=128)[0]
    state, namespace = layer.weight.quant_state, torch.ops.bitsandbytes
    install()
    torch.library.opcheck(namespace.quantize_4bit.default, (X, 64, "nf4", torch.uint8))
    scales = (state.absmax, state.state2.code, state.offset) if nested else (None, None, None)
    absmax = state.state2.absmax if nested else state.absmax
    x = torch.randn(2, 3, 128).bfloat16()
    arguments = (x, layer.weight.data, list(state.shape), absmax, 64, "nf4", None, *scales)
    torch.library.opcheck(namespace.gemm_4bit.default, arguments)
    assert {"nf4_quantize", "nf4_linear"} <= set(calls)


def test_another_map_of_the_scales_goes_to_bitsandbytes(calls: list[str]) -> None:
    layer = theirs(True)[0]
    state = layer.weight.quant_state
    state.state2.code = state.state2.code * 1.5
    install()
    y = bnb.matmul_4bit(X.bfloat16().requires_grad_(), layer.weight, state)
    assert calls == []
    torch.testing.assert_close(y, nn.functional.linear(X.bfloat16(), dequantized(layer).bfloat16()))


def test_what_serves_gpus_alone_is_right_too(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantizing and the product for one row are bitsandbytes' own on CPUs; here they are put there for a test."""
    monkeypatch.setitem(bitsandbytes_kernels._REPLACED, "CPU", bitsandbytes_kernels._REPLACED["CUDA"])
    layer = theirs(False)[0]
    state = layer.weight.quant_state
    x = X[:1].bfloat16()
    weight = dequantized(layer)
    install()
    assert torch.equal(dequantized(layer), weight)
    y = torch.ops.bitsandbytes.gemv_4bit(x, layer.weight.data, state.shape, state.absmax, state.code, 64)
    assert calls == ["nf4_dequantize", "nf4_linear"]
    assert torch.equal(y, nn.functional.linear(x, weight.bfloat16()))
    halves = torch.ops.bitsandbytes.dequantize_4bit(
        layer.weight.data, state.absmax, 64, "nf4", [192 * 75], torch.float16
    )
    assert torch.equal(halves, formats.quantize(weight, double_quant=False).dequantize(torch.float16).view(-1))


def test_installing_twice_is_as_once_and_can_be_undone(calls: list[str]) -> None:
    install()
    install()
    uninstall()
    torch.ops.bitsandbytes.quantize_4bit(X, 64, "nf4", torch.uint8)
    assert calls == []
    install()
    torch.ops.bitsandbytes.quantize_4bit(X, 64, "nf4", torch.uint8)
    assert calls == ["nf4_quantize"]


@pytest.mark.parametrize(("value", "expected"), [("1", ["nf4_quantize"]), ("0", []), (None, [])])
def test_the_entry_point_acts_when_it_is_asked_to(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, value: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("QSHARDED_BITSANDBYTES", raising=False)
    if value is not None:
        monkeypatch.setenv("QSHARDED_BITSANDBYTES", value)
    entry.bitsandbytes_backend()
    torch.ops.bitsandbytes.quantize_4bit(X, 64, "nf4", torch.uint8)
    assert calls == expected


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(qsharded.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["bitsandbytes.backends"]["qsharded"].partition(":")
    assert getattr(import_module(module), name) is entry.bitsandbytes_backend
