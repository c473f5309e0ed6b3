"""A format and kernels that come from outside, used through the public layer and the operations."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qsharded.quant import backends, formats, ops
from qsharded.quant.codebooks import CODEBOOKS
from qsharded.quant.formats import NF4_64, QuantFormat
from qsharded.quant.kernels import Kernels
from qsharded.quant.linear import PackedLinear
from qsharded.quant.pack_weight import pack_weight
from qsharded.quant.packed_weight import PackedWeight
from qsharded.quant.scale_encoding import ScaleEncoding

UNIFORM = tuple(step / 8 for step in range(-8, 8))
# MXFP4: elements in E2M1 (here in units of 8, which exceeds the largest by a third), a power of two for each 32
E2M1 = tuple(sign * value / 8 for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
E8M0 = ScaleEncoding(
    torch.uint8,
    encode=lambda absmax: (torch.frexp(absmax).exponent + 127).clamp(0, 254).to(torch.uint8),
    decode=lambda stored: torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127),
)


class UniformKernels(Kernels):
    """Of whole steps of an eighth; they note what they are asked for."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def quantizes(self, quant_format: QuantFormat) -> bool:
        return quant_format.quant_type == "uniform"

    def quantize(self, weight: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
        self._asked.append("quantize")
        return formats.quantize_blocks(weight, quant_format)

    def dequantizes(self, quant_format: QuantFormat, dtype: torch.dtype) -> bool:
        return self.quantizes(quant_format)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        self._asked.append("dequantize")
        return backends.dequantize_by_reference(packed, dtype)

    def multiplies(self, packed: PackedWeight, M: int, dtype: torch.dtype) -> bool:
        return self.quantizes(packed.quant_format) and M == 1

    def linear(self, x_MK: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        self._asked.append("linear")
        return nn.functional.linear(x_MK, backends.dequantize_by_reference(packed, x_MK.dtype), bias)


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays registered, and QSHARDED_BACKEND is asked anew."""
    caches = backends.wanted_backend, backends._kernels
    monkeypatch.setattr(formats, "CODEBOOKS", dict(CODEBOOKS))
    monkeypatch.setattr(formats, "SCALE_ENCODINGS", dict(formats.SCALE_ENCODINGS))
    monkeypatch.setattr(backends, "_registered", {device: dict(f) for device, f in backends._registered.items()})
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def uniform_weight(codes: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """By definition: high nibble first, step times absmax."""
    both = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).float()
    return (both - 8) / 8 * absmax.repeat_interleave(block_size, dim=1)


@pytest.mark.parametrize("block_size", [64, 128])
def test_a_format_from_outside_is_quantized_and_multiplied_without_kernels_of_its_own(block_size: int) -> None:
    formats.register_format("uniform", UNIFORM)
    linear = nn.Linear(256, 7)
    layer = PackedLinear.from_linear(linear, quant_type="uniform", block_size=block_size, double_quant=False)
    packed = layer.packed()
    expected = uniform_weight(packed.codes, packed.absmax, block_size)
    assert torch.equal(layer.dequantize(torch.float32), expected)
    step = linear.weight.abs().unflatten(1, (-1, block_size)).amax(-1).repeat_interleave(block_size, 1) / 8
    assert ((expected - linear.weight).abs() <= step + 1e-7).all()
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), nn.functional.linear(x, expected, linear.bias))


def test_kernels_from_outside_serve_their_format_and_no_other() -> None:
    asked: list[str] = []
    formats.register_format("uniform", UNIFORM)
    backends.register_kernels("cpu", "uniform", lambda device: UniformKernels(asked))
    plain, linear = PackedLinear.from_linear(nn.Linear(128, 7)), nn.Linear(128, 7)
    plain(torch.randn(2, 128))
    assert asked == []
    layer = PackedLinear.from_linear(linear, quant_type="uniform")
    expected = layer.dequantize(torch.float32)
    assert asked == ["quantize", "dequantize"]
    for M, more in ((1, "linear"), (2, "dequantize")):
        x = torch.randn(M, 128)
        assert torch.equal(layer(x), nn.functional.linear(x, expected, linear.bias))
        assert asked.pop() == more


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scales [N, K/32]) by the definition (OCP Microscaling Formats 1.0, 6.3), in fp64: each block is divided
    by 2^(floor(log2(absmax)) - 2), 2 being the largest exponent of an element; then the nearest element is taken."""
    blocks = weight.double().unflatten(1, (-1, 32))
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    elements = torch.tensor(E2M1, dtype=torch.float64) * 8
    nearest = ((blocks / scale).unsqueeze(-1) - elements).abs().argmin(-1)
    return (elements[nearest] * scale).flatten(1), scale.squeeze(-1)


@pytest.mark.parametrize("K", [96, 256])
def test_a_format_whose_scales_are_powers_of_two_needs_no_stack_of_its_own(K: int) -> None:
    """Packed, kept in a layer's rows (odd ones are padded), multiplied and differentiated, without double quantization
    though that is the default."""
    formats.register_format("mxfp4", E2M1, E8M0)
    linear = nn.Linear(K, 7)
    layer = PackedLinear.from_linear(linear, quant_type="mxfp4", block_size=32)
    packed = layer.packed()
    expected, scales = mxfp4(linear.weight)
    assert (packed.absmax.dtype, packed.absmax_scales, packed.absmax_offset) == (torch.uint8, None, None)
    assert torch.equal(2.0 ** (packed.absmax.double() - 127), scales * 8)
    assert torch.equal(layer.dequantize(torch.float32).double(), expected)
    by_reference = formats.quantize(linear.weight, quant_type="mxfp4", block_size=32)
    assert torch.equal(by_reference.dequantize(torch.float32), expected.float())
    x = torch.randn(3, K, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, expected.float(), linear.bias))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, expected.float().sum(0).expand(3, K), rtol=1e-5, atol=1e-6)


def test_kernels_are_registered_for_a_format_with_other_scales() -> None:
    """Ours, which are written for absmax, are not asked even in blocks of 64."""
    asked: list[str] = []
    formats.register_format("uniform", UNIFORM, E8M0)
    linear = nn.Linear(128, 7)
    by_reference = PackedLinear.from_linear(linear, quant_type="uniform")
    expected = by_reference.dequantize(torch.float32)
    assert ((expected - linear.weight).abs() <= linear.weight.abs().max() / 4).all()
    backends.register_kernels("cpu", "uniform", lambda device: UniformKernels(asked))
    layer = PackedLinear.from_linear(linear, quant_type="uniform")
    assert torch.equal(layer.dequantize(torch.float32), expected)
    assert asked == ["quantize", "dequantize"]


def test_a_backend_from_outside_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.register_kernels("cpu", "mine", lambda device: UniformKernels([]))
    backends.register_kernels("cpu", "absent", lambda device: None)
    monkeypatch.setenv("QSHARDED_BACKEND", "mine")
    assert backends.serving(torch.device("cpu")).startswith("mine, as QSHARDED_BACKEND asks")
    assert [type(kernels) for kernels in backends._kernels(torch.device("cpu"))] == [UniformKernels]
    assert "absent" not in backends.implementations(torch.device("cpu"))


def test_names_that_are_taken_and_codebooks_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="quant_type 'fp4' is registered already"):
        formats.register_format("fp4", UNIFORM)
    for codebook in (UNIFORM[1:], (*UNIFORM[1:], 1.5), (*UNIFORM[1:], float("nan"))):
        with pytest.raises(ValueError, match="codebook of 'uniform' must be 16 values from -1 to 1"):
            formats.register_format("uniform", codebook)
    with pytest.raises(ValueError, match="'reference' is plain PyTorch"):
        backends.register_kernels("cpu", "reference", lambda device: None)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("K", [192, 256])
def test_a_packed_weight_is_stored_and_found_again(K: int, double_quant: bool) -> None:
    """In the shapes that its format names; odd rows of absmax codes are padded on the way."""
    packed = pack_weight(torch.randn(7, K), double_quant=double_quant)
    stored = NF4_64.stored_tensors(7, K, double_quant=double_quant)
    tensors = {name: getattr(packed, name) for name in stored}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == stored
    rows = packed.stored_rows()
    assert {tensor.dtype for tensor in rows} == {torch.bfloat16}
    again = PackedWeight.from_stored_rows(*rows, packed.absmax_scales, packed.absmax_offset, NF4_64)
    again.check()
    assert again.shape == packed.shape == (7, K)
    assert all(torch.equal(getattr(again, name), tensor) for name, tensor in tensors.items())
    assert torch.equal(ops.nf4_dequantize(again), ops.nf4_dequantize(packed))
