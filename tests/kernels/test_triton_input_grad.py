"""dy W in Triton, interpreted where there is no GPU, against the fp64 product of the exact weights."""

import pytest
import torch

from qsharded.quant import backends, own_kernels
from qsharded.quant.kernels import Kernels
from qsharded_kernels.triton_tiles import InputGradTile
from tests.kernels.cases import assert_same_bits
from tests.kernels.packed_products import KINDS, activations, assert_errs_no_more, exact, packed, random

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

N = 83
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@dtypes
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_error_is_that_of_decoding_first(kind: str, quant_type: str, dtype: torch.dtype) -> None:
    """Its weights are the same to the bit, so that it differs by fp32 sums alone: 2^-16 of the products' size at most,
    a hundredth of what rounding y in bf16 takes, a tenth in fp16."""
    weight = packed(256, 192, quant_type)
    grad = activations(kind, 16, exact(weight).T.contiguous(), dtype)
    tile = InputGradTile(rows=128)
    assert_errs_no_more(own_kernels.triton_input_grad(grad, weight, tile=tile), grad, exact(weight).T, room=1.01)


@dtypes
@pytest.mark.parametrize("double_quant", [True, False])
def test_identity_gives_the_decoded_weights(double_quant: bool, dtype: torch.dtype) -> None:
    weight = packed(40, 9 * 64, double_quant=double_quant)
    y = own_kernels.triton_input_grad(torch.eye(40, dtype=dtype, device=weight.device), weight)
    assert torch.equal(y, backends.dequantize_by_reference(weight, dtype))  # by value: a sum has no -0


@pytest.mark.parametrize("M", [1, 33])
@pytest.mark.parametrize("splits", [1, 2, 99])
def test_parts_of_n_make_the_sum(splits: int, M: int) -> None:
    """dy in strided rows; splits that leave the last part short, and more of them than there are turns."""
    weight, tile = packed(N, 5 * 64), InputGradTile(rows=16, blocks=2)
    grad = random(N, M).half().T
    grad_x = own_kernels.triton_input_grad(grad, weight, tile=tile, splits=splits)
    expected = grad.double() @ exact(weight)
    torch.testing.assert_close(grad_x.double(), expected, rtol=1e-3, atol=2e-3 * N**0.5)
    assert_same_bits(grad_x, own_kernels.triton_input_grad(grad, weight, tile=tile, splits=splits))


def test_the_operation_asks_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused(Kernels):
        def multiplies_grad(self, packed: object, M: int, dtype: torch.dtype) -> bool:
            return M <= 6 and dtype == torch.bfloat16

        def input_grad(self, grad_MN: torch.Tensor, packed: object) -> torch.Tensor:
            return torch.full((len(grad_MN), 128), 7.0, dtype=grad_MN.dtype)

    monkeypatch.setattr(backends, "_kernels", lambda device: (Fused(),))
    weight = packed(32, 128)
    few, many = (torch.ops.qsharded.nf4_linear_input_grad(random(2, M, 32).bfloat16(), *weight.tensors) for M in (3, 4))
    assert (few.shape, few.unique().tolist()) == ((2, 3, 128), [7.0])
    assert len(many.unique()) > 1
