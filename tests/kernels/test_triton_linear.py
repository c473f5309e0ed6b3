"""The fused product in Triton, interpreted where there is no GPU, against the fp64 product of the exact weights."""

import pytest
import torch
from torch import Tensor

from qsharded.quant import own_kernels
from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import pack_weight
from qsharded.quant.packed_weight import PackedWeight
from tests.kernels.cases import assert_same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K = 72, 320  # a tile of rows of W and part of another; five blocks
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(quant_type: str = "nf4", double_quant: bool = True, rows: int = N) -> PackedWeight:
    weight = random(rows, K).to(DEVICE)
    return pack_weight(weight, QuantFormat(quant_type), double_quant=double_quant)


def exact(weight: PackedWeight) -> Tensor:
    """fp64 [N, K] of fp32 value and fp32 absmax."""
    codebook = torch.tensor(weight.quant_format.codebook, dtype=torch.float32).double().to(DEVICE)
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    return codebook[codes] * weight.decoded_absmax().double().repeat_interleave(64, 1)


def activations(kind: str, M: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    x = random(M, K).to(DEVICE)
    if kind == "positive":
        x = x.abs().clamp(max=1)
    elif kind == "outliers":
        x[:, ::37] *= 50
    elif kind == "aligned":
        x = weight[:M].sign().float()
    elif kind == "sparse":  # 64 that are not zero
        x[:, torch.arange(K) % 5 > 0] = 0
    return x.to(dtype)


@dtypes
@types
@pytest.mark.parametrize("kind", ["normal", "positive", "outliers", "aligned", "sparse"])
def test_its_error_is_no_larger_than_that_of_decoding_first(kind: str, quant_type: str, dtype: torch.dtype) -> None:
    """Root mean square no larger, the largest at most 1.1 times; decoding first rounds the weight, then y."""
    weight = packed(quant_type, rows=512)
    x = activations(kind, 16, exact(weight), dtype)
    expected = x.double() @ exact(weight).T
    decoded = (x.double() @ exact(weight).float().to(dtype).double().T).to(dtype)
    errors, allowed = (own_kernels.triton_linear(x, weight, None) - expected).abs(), (decoded - expected).abs()
    assert errors.square().mean() <= allowed.square().mean()
    assert errors.max() <= 1.1 * allowed.max()


@dtypes
@types
def test_single_weights_are_within_an_ulp_and_zeros_stay_zeros(quant_type: str, dtype: torch.dtype) -> None:
    weight = packed(quant_type)
    for first in range(0, K, 16):
        x = torch.eye(K, device=DEVICE, dtype=dtype)[first : first + 16]
        y, expected = own_kernels.triton_linear(x, weight, None).double(), exact(weight).T[first : first + 16]
        ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** expected.abs().log2().floor()
        assert ((y - expected).abs() <= ulp).all()
        assert (y[expected == 0] == 0).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize("splits", [1, 2, 4, 9])
def test_parts_of_k_and_bias_make_the_sum(splits: int, M: int, double_quant: bool) -> None:
    """Splits that leave the last part short, or empty, too."""
    weight, bias = packed(double_quant=double_quant), random(N).to(DEVICE).half()
    x = random(K, M).to(DEVICE).half().T
    y = own_kernels.triton_linear(x, weight, bias, splits=splits)
    assert (y.dtype, y.shape) == (torch.float16, (M, N))
    expected = x.double() @ exact(weight).T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=2e-3 * K**0.5)
    assert_same_bits(y, own_kernels.triton_linear(x, weight, bias, splits=splits))


@pytest.mark.parametrize(("asked", "fuses"), [(None, False), ("compiled", False), ("triton", True)])
def test_it_serves_only_where_triton_is_asked_for(
    asked: str | None, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QSHARDED_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("QSHARDED_BACKEND", asked)
    kernels = own_kernels.triton_for_cuda(torch.device("cuda"))
    assert kernels is not None
    assert kernels.multiplies(packed(), 16, torch.bfloat16) == fuses
    assert not kernels.multiplies(packed(), 17, torch.bfloat16)
    assert not kernels.multiplies(packed(), 16, torch.float32)
