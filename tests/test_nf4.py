"""The public quantizer: by kernels, and to the bytes of the reference."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import qsharded
from qsharded.quant import backends, formats
from qsharded.quant.formats import QuantFormat
from qsharded.quant.kernels import Kernels
from qsharded.quant.packed_weight import PackedWeight
from tests.kernels.cases import assert_same_bits, random_weight

ATTRIBUTES = ("codes", "absmax", "absmax_codes", "absmax_scales", "absmax_offset")
every_dtype = pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES, ids=str)
nested_or_not = pytest.mark.parametrize("double_quant", [True, False])


class Marked(Kernels):
    """Kernels whose results show that they were asked."""

    def quantizes(self, quant_format: QuantFormat) -> bool:
        return True

    def quantize(self, weight: Tensor, quant_format: QuantFormat) -> tuple[Tensor, Tensor]:
        codes, absmax = formats.quantize_blocks(weight, quant_format)
        return codes.fill_(0x5A), absmax

    def dequantizes(self, quant_format: QuantFormat, dtype: torch.dtype) -> bool:
        return True

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        return torch.full(packed.shape, 7, dtype=dtype)


@pytest.fixture
def _marked() -> Iterator[None]:
    backends.register_kernels("cpu", "marked", lambda device: Marked())
    yield
    backends.unregister_kernels("cpu", "marked")


def assert_same_weight(actual: qsharded.nf4.NF4Weight, expected: formats.ReferenceWeight) -> None:
    assert actual.quant_format == expected.quant_format
    for name in ATTRIBUTES:
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            assert_same_bits(mine, theirs)


@every_dtype
@nested_or_not
@pytest.mark.parametrize(("quant_type", "block_size"), [("nf4", 64), ("fp4", 64), ("nf4", 128), ("fp4", 32)])
def test_it_gives_the_bytes_of_the_reference(
    quant_type: str, block_size: int, double_quant: bool, dtype: torch.dtype
) -> None:
    # 21 x 14 blocks of 64 are more than one second-level block of 256, and end within the second
    weight = random_weight((21, 896), dtype).requires_grad_()
    kind = {"quant_type": quant_type, "block_size": block_size}
    actual = qsharded.nf4.quantize(weight, **kind, double_quant=double_quant)
    expected = qsharded.nf4.quantize_by_reference(weight, **kind, double_quant=double_quant)
    assert_same_weight(actual, expected)
    for out in formats.FLOAT_DTYPES:
        assert_same_bits(actual.dequantize(out), expected.dequantize(out))


def test_a_transposed_weight_is_quantized_as_it_reads() -> None:
    weight = random_weight((128, 7), torch.float32).T
    assert_same_weight(qsharded.nf4.quantize(weight), qsharded.nf4.quantize_by_reference(weight))


@pytest.mark.usefixtures("_marked")
def test_kernels_quantize_and_dequantize_it_and_leave_the_reference_alone() -> None:
    weight = random_weight((3, 128), torch.float32)
    packed, reference = qsharded.nf4.quantize(weight), qsharded.nf4.quantize_by_reference(weight)
    assert (packed.codes == 0x5A).all()
    assert not (reference.codes == 0x5A).all()
    assert (packed.dequantize() == 7).all()
    assert not (reference.dequantize() == 7).all()


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (torch.tensor([[float("nan")] * 64]), {}, "NaN or infinity"),
        (torch.full((2, 64), float("inf")), {}, "NaN or infinity"),
        (torch.ones(64), {}, "non-empty matrix"),
        (torch.ones(0, 64), {}, "non-empty matrix"),
        (torch.ones(2, 96), {}, "multiple of 64"),
        (torch.ones(2, 64).double(), {}, "bfloat16, float16 or float32"),
        (torch.ones(2, 64), {"quant_type": "int4"}, "quant_type must be one of"),
        (torch.ones(2, 64), {"block_size": 48}, "block_size must be one of"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight: Tensor, kind: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qsharded.nf4.quantize(weight, **kind)
