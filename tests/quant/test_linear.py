"""Packed bytes must survive whatever is done to a module, or the doing must fail.

Axes: N = out_features, K = in_features, G = K/64 blocks in a row.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from qsharded.nn import PackedLinear
from qsharded.quant import formats
from tests.kernels.cases import assert_same_bits, random_weight

PACKED = ("weight", "weight_absmax")
BUFFERS = ("weight_absmax_scales", "weight_absmax_offset")


def linear(K: int = 576, N: int = 40, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    made = nn.Linear(K, N, bias=bias)
    with torch.no_grad():
        made.weight.copy_(random_weight((N, K), torch.float32))
        if bias:
            made.bias.copy_(random_weight((N, 1), torch.float32)[:, 0])
    return made.to(dtype)


def activations(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def all_patterns() -> PackedLinear:
    """Each of the 65,536 bf16 patterns stands in the weight once, and every kind of NaN in the absmax."""
    layer = PackedLinear.from_linear(linear(512, 512))
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    layer.weight.data.view(torch.int16).copy_(patterns.view(512, 128))
    nans = patterns.view(torch.bfloat16).isnan()
    absmax = layer.weight_absmax.data.view(torch.int16)
    absmax.copy_(patterns[nans].repeat(9)[: absmax.numel()].view_as(absmax))
    return layer


def bytes_of(layer: PackedLinear) -> dict[str, Tensor]:
    """Copies of every bit that a forward reads; ``torch.equal`` is False on NaN patterns."""
    named = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: tensor.detach().clone().view(-1).view(torch.uint8) for name, tensor in named}


def assert_same_bytes(layer: PackedLinear, expected: dict[str, Tensor]) -> None:
    actual = bytes_of(layer)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert_same_bits(actual[name], wanted)
    assert layer.weight.dtype == layer.weight_absmax.dtype == torch.bfloat16
    assert layer.weight_absmax_scales.dtype == layer.weight_absmax_offset.dtype == torch.float32


# --- what it holds ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [64, 128, 576])
def test_it_holds_what_nf4_quantize_gives(K: int, dtype: torch.dtype) -> None:
    dense = linear(K, dtype=dtype)
    layer, packed = PackedLinear.from_linear(dense), formats.quantize(dense.weight)
    for actual, expected in zip(layer.packed().tensors, (packed.codes, packed.absmax_codes), strict=False):
        assert_same_bits(actual.contiguous(), expected)
    assert_same_bits(layer.weight_absmax_scales, packed.absmax_scales)
    assert_same_bits(layer.weight_absmax_offset, packed.absmax_offset)
    for out in (torch.bfloat16, torch.float32):
        assert_same_bits(layer.dequantize(out), packed.dequantize(out))
    assert_same_bits(layer.dequantize(), packed.dequantize())


@pytest.mark.parametrize("K", [64, 128, 576])
def test_without_double_quantization_it_holds_fp32_absmax(K: int) -> None:
    dense = linear(K)
    layer, packed = (
        PackedLinear.from_linear(dense, double_quant=False),
        formats.quantize(dense.weight, double_quant=False),
    )
    codes, absmax, scales, offset = layer.packed().tensors
    assert_same_bits(codes, packed.codes)
    assert_same_bits(absmax, packed.absmax)
    assert absmax.data_ptr() == layer.weight_absmax.data_ptr()
    assert scales is offset is None
    assert_same_bits(layer.dequantize(torch.float32), packed.dequantize(torch.float32))
    x = activations(3, K)
    assert_same_bits(layer(x).detach(), F.linear(x, packed.dequantize(), dense.bias).detach())


def test_without_double_quantization_moves_casts_and_saves_keep_the_bytes() -> None:
    layer = PackedLinear.from_linear(linear(), double_quant=False)
    before = bytes_of(layer)
    assert before.keys() == {*PACKED, "bias"}
    empty = PackedLinear(576, 40, double_quant=False, device="meta").to_empty(device="cpu")
    empty.load_state_dict(load(save(layer.state_dict())))
    for other in (layer.bfloat16().cpu(), copy.deepcopy(layer), empty):
        for name, wanted in before.items():
            assert_same_bits(bytes_of(other)[name], wanted)
    with pytest.raises(TypeError, match="cannot be cast"):
        layer.float()


@pytest.mark.parametrize(("K", "words"), [(64, 1), (128, 1), (192, 2), (576, 5)])
def test_storage_is_bf16_words_in_whole_rows_and_an_odd_row_of_absmax_ends_in_zero(K: int, words: int) -> None:
    layer = PackedLinear.from_linear(linear(K, 7))
    assert (layer.weight.shape, layer.weight_absmax.shape) == ((7, K // 4), (7, words))
    if K // 64 % 2:
        assert (layer.weight_absmax.view(torch.uint8)[:, -1] == 0).all()
    assert layer.packed().tensors[1].shape == (7, K // 64)


@pytest.mark.parametrize(
    ("K", "block_size", "words", "fp32_words"), [(96, 32, 2, 6), (128, 128, 1, 2), (384, 128, 2, 6), (8192, 4096, 1, 4)]
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_other_kinds_are_stored_in_whole_rows_too(
    K: int, block_size: int, words: int, fp32_words: int, quant_type: str
) -> None:
    dense, kind = linear(K, 7), {"quant_type": quant_type, "block_size": block_size}
    layer, expected = PackedLinear.from_linear(dense, **kind), formats.quantize(dense.weight, **kind)
    assert (layer.weight.shape, layer.weight_absmax.shape) == ((7, K // 4), (7, words))
    parts = expected.codes, expected.absmax_codes, expected.absmax_scales, expected.absmax_offset
    for actual, wanted in zip(layer.packed().tensors, parts, strict=True):
        assert_same_bits(actual.contiguous(), wanted)
    if K // block_size % 2:
        assert (layer.weight_absmax.view(torch.uint8)[:, -1] == 0).all()
    assert f"quant_type={quant_type}, block_size={block_size}" in repr(layer)
    plain = PackedLinear.from_linear(dense, double_quant=False, **kind)
    assert plain.weight_absmax.shape == (7, fp32_words)
    assert_same_bits(plain.packed().tensors[1], formats.quantize_blocks(dense.weight, layer.quant_format)[1])
    assert copy.deepcopy(layer).quant_format == layer.quant_format == formats.QuantFormat(**kind)


def test_rows_of_no_whole_blocks_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features must be a multiple of 128, got 192"):
        PackedLinear(192, 8, block_size=128)
    with pytest.raises(ValueError, match="quant_type must be one of"):
        PackedLinear(192, 8, quant_type="int4")


def test_packed_are_views() -> None:
    layer = PackedLinear.from_linear(linear())
    codes, absmax, scales, offset = layer.packed().tensors
    assert codes.data_ptr() == layer.weight.data_ptr()
    assert absmax.data_ptr() == layer.weight_absmax.data_ptr()
    assert scales is layer.weight_absmax_scales
    assert offset is layer.weight_absmax_offset


def test_nothing_of_it_trains_and_all_of_it_is_saved() -> None:
    layer = PackedLinear.from_linear(linear())
    assert not any(p.requires_grad for p in layer.parameters())
    assert set(layer.state_dict()) == {*PACKED, *BUFFERS, "bias"}
    assert set(PackedLinear.from_linear(linear(bias=False)).state_dict()) == {*PACKED, *BUFFERS}


def test_the_bias_is_shared_and_the_weight_is_not_touched() -> None:
    dense = linear(dtype=torch.float32)
    before = dense.weight.detach().clone()
    layer = PackedLinear.from_linear(dense)
    assert layer.bias.data_ptr() == dense.bias.data_ptr()
    assert_same_bits(dense.weight.detach(), before)
    assert dense.bias.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_it_trains_or_not_as_the_layer_that_it_replaces(training: bool) -> None:
    assert PackedLinear.from_linear(linear().train(training)).training is training


def test_on_the_meta_device_shapes_alone_are_taken() -> None:
    layer = PackedLinear.from_linear(linear().to("meta"))
    filled = PackedLinear.from_linear(linear())
    assert all(t.is_meta for t in layer.state_dict().values())
    shapes = [{k: (t.shape, t.dtype) for k, t in m.state_dict().items()} for m in (layer, filled)]
    assert shapes[0] == shapes[1]
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    assert_same_bytes(layer, bytes_of(filled))


# --- forward and backward ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("K", [64, 576])
def test_forward_and_backward_are_a_dense_layer_with_the_dequantized_weight(
    K: int, bias: bool, dtype: torch.dtype
) -> None:
    layer = PackedLinear.from_linear(linear(K, bias=bias))
    x, dense_x = (activations(2, 5, K, dtype=dtype).requires_grad_() for _ in range(2))
    y = layer(x)
    dense = F.linear(dense_x, layer.dequantize(dtype), layer.bias.to(dtype) if bias else None)
    assert_same_bits(y.detach(), dense.detach())
    upstream = activations(*y.shape, dtype=dtype)
    y.backward(upstream)
    dense.backward(upstream)
    assert x.grad.dtype == dtype
    # fp32: other order of summation; bf16: the same sum, rounded once
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(x.grad, dense_x.grad, **tolerance)


def test_a_bias_in_fp32_serves_bf16_activations() -> None:
    layer = PackedLinear.from_linear(linear(dtype=torch.float32))
    x = activations(3, 576)
    assert layer.bias.dtype == torch.float32
    assert_same_bits(layer(x), F.linear(x, layer.dequantize(), layer.bias.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_compiles_whole_and_gives_the_same(dtype: torch.dtype) -> None:
    layer = PackedLinear.from_linear(linear())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        x = activations(3, 576, dtype=dtype).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for eager, traced in zip(*results, strict=True):
        assert_same_bits(traced, eager)


# --- what bytes survive ---


def through_load_state_dict(layer: PackedLinear) -> PackedLinear:
    other = PackedLinear(512, 512)
    other.load_state_dict(layer.state_dict())
    return other


def through_an_assigning_load_onto_meta(layer: PackedLinear) -> PackedLinear:
    other = PackedLinear(512, 512, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


def through_torch_save(layer: PackedLinear) -> PackedLinear:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = PackedLinear(512, 512)
    other.load_state_dict(torch.load(file))
    return other


def through_safetensors(layer: PackedLinear) -> PackedLinear:
    other = PackedLinear(512, 512)
    other.load_state_dict(load(save(layer.state_dict())))
    return other


def through_compiled_reading(layer: PackedLinear) -> PackedLinear:
    torch.compile(layer, fullgraph=True, backend="aot_eager")(activations(2, 512))
    return layer


def through_to_empty_and_back(layer: PackedLinear) -> PackedLinear:
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    return layer


JOURNEYS: list[Callable[[PackedLinear], nn.Module]] = [
    through_load_state_dict,
    through_an_assigning_load_onto_meta,
    through_torch_save,
    through_safetensors,
    through_compiled_reading,
    through_to_empty_and_back,
    copy.deepcopy,
    lambda layer: pickle.loads(pickle.dumps(layer)),
    lambda layer: layer.to("cpu"),
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: layer.bfloat16(),
    lambda layer: layer.type(torch.bfloat16),
    lambda layer: layer.to("cpu", torch.bfloat16, non_blocking=True),
    lambda layer: layer.share_memory(),
    lambda layer: nn.Sequential(nn.Sequential(layer)).to(torch.bfloat16)[0][0],
]


@pytest.mark.parametrize("journey", JOURNEYS)
def test_all_65536_patterns_survive(journey: Callable[[PackedLinear], PackedLinear]) -> None:
    layer = all_patterns()
    expected = bytes_of(layer)
    assert expected["weight"].view(torch.int16).unique().numel() == 65536
    assert_same_bytes(journey(layer), expected)


def test_moving_to_meta_moves_everything_and_keeps_dtypes() -> None:
    layer = PackedLinear.from_linear(linear()).to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert {layer.get_buffer(name).dtype for name in BUFFERS} == {torch.float32}


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
def test_a_cast_to_bf16_casts_the_bias_and_no_buffer(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = PackedLinear.from_linear(linear(dtype=torch.float32))
    before = bytes_of(layer)
    scales = layer.weight_absmax_scales.clone()
    assert not torch.equal(scales.bfloat16().float(), scales)  # a detour through bf16 would show
    cast(layer)
    assert layer.bias.dtype == torch.bfloat16
    after = bytes_of(layer)
    for name in (*PACKED, *BUFFERS):
        assert_same_bits(after[name], before[name])


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to float16": lambda m: m.to(torch.float16),
    "to float32": lambda m: m.to(torch.float32),
    "to float64": lambda m: m.to(torch.float64),
    "to float8": lambda m: m.to(torch.float8_e4m3fn),
    "to device and float16": lambda m: m.to("cpu", torch.float16),
    "to a tensor's": lambda m: m.to(torch.ones(1)),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("cast", CASTS)
def test_other_casts_raise_and_leave_every_byte(cast: str, inside: bool) -> None:
    layer = all_patterns()
    expected = bytes_of(layer)
    with pytest.raises(TypeError, match="a PackedLinear cannot be cast: its packed bytes"):
        CASTS[cast](nn.Sequential(layer, nn.Linear(4, 4)) if inside else layer)
    assert_same_bytes(layer, expected)
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8], ids=str)
def test_forward_refuses_bytes_that_were_cast_behind_its_back_and_names_them(dtype: torch.dtype, name: str) -> None:
    layer = PackedLinear.from_linear(linear())
    cast = nn.Parameter(layer.get_parameter(name).to(dtype), requires_grad=False)
    setattr(layer, name, cast)  # as FSDP2's param_dtype, or a load with assign=True, would
    with pytest.raises(TypeError, match=rf"stored as bfloat16, but {name} arrived as {dtype}: they are destroyed"):
        layer(activations(2, 576))
    with pytest.raises(TypeError, match="are destroyed"):
        layer.dequantize()


@pytest.mark.parametrize("name", BUFFERS)
def test_forward_refuses_buffers_that_were_cast_behind_its_back(name: str) -> None:
    layer = PackedLinear.from_linear(linear())
    setattr(layer, name, layer.get_buffer(name).bfloat16())
    with pytest.raises(ValueError, match=rf"{name.removeprefix('weight_')} must be .*float32"):
        layer(activations(2, 576))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_state_dict_whose_bytes_were_cast_is_refused(dtype: torch.dtype, name: str) -> None:
    """Copied back into bf16, its NaN patterns are others."""
    layer = PackedLinear.from_linear(linear())
    state = layer.state_dict()
    with pytest.raises((TypeError, RuntimeError), match=rf"{name} .*{dtype}"):
        layer.load_state_dict(state | {name: state[name].to(dtype)})


def test_a_state_dict_of_a_dense_layer_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        PackedLinear(576, 40).load_state_dict(linear().state_dict())


# --- errors ---


@pytest.mark.parametrize("K", [1, 63, 100, 96])
def test_in_features_must_be_a_multiple_of_64(K: int) -> None:
    with pytest.raises(ValueError, match=f"in_features must be a multiple of 64, got {K}"):
        PackedLinear(K, 8)
    with pytest.raises(ValueError, match=f"in_features must be a multiple of 64, got {K}"):
        PackedLinear.from_linear(nn.Linear(K, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    dense = linear()
    dense.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"^model\.x\.weight holds NaN or infinity"):
        PackedLinear.from_linear(dense, "model.x.weight")


def test_a_weight_of_another_dtype_is_named() -> None:
    with pytest.raises(ValueError, match=r"^up\.weight must be bfloat16, float16 or float32 .* got torch.float64"):
        PackedLinear.from_linear(linear(dtype=torch.float64), "up.weight")


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x's last axis must be 576, got torch\.bfloat16"):
        PackedLinear.from_linear(linear())(activations(2, 512))
