"""Weights, activations and fp64 answers that the products in Triton are held to."""

import torch
from torch import Tensor

from qsharded.quant.formats import QuantFormat
from qsharded.quant.pack_weight import pack_weight
from qsharded.quant.packed_weight import PackedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def packed(N: int, K: int, quant_type: str = "nf4", double_quant: bool = True) -> PackedWeight:
    """The absmax rows lie a byte and more apart, as the padding of odd rows leaves them."""
    weight = pack_weight(random(N, K), QuantFormat(quant_type), double_quant=double_quant)
    codes, absmax, scales, offset = weight.tensors
    padded = absmax.new_zeros(N, absmax.shape[1] + 3)
    padded[:, : absmax.shape[1]] = absmax
    return PackedWeight(codes, padded[:, : absmax.shape[1]], scales, offset, weight.quant_format)


def exact(weight: PackedWeight) -> Tensor:
    """fp64 [N, K] of fp32 value and fp32 absmax."""
    codebook = torch.tensor(weight.quant_format.codebook, dtype=torch.float32).double().to(DEVICE)
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    return codebook[codes] * weight.decoded_absmax().double().repeat_interleave(64, 1)


KINDS = ("normal", "positive", "outliers", "aligned", "sparse")


def activations(kind: str, M: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of as many columns as ``weight`` has; "aligned" with the signs of its own."""
    x = random(M, weight.shape[1])
    if kind == "positive":
        x = x.abs().clamp(max=1)
    elif kind == "outliers":
        x[:, ::37] *= 50
    elif kind == "aligned":
        x = weight[:M].sign().float()
    elif kind == "sparse":  # at least 64 that are not zero
        x[:, torch.arange(x.shape[1]) % 5 > 0] = 0
    return x.to(dtype)


def assert_errs_no_more(y: Tensor, x: Tensor, weight: Tensor, *, room: float = 1.0) -> None:
    """Than decoding ``weight`` (fp64 [N, K]) to x's dtype and multiplying then, of which y is rounded too: root mean
    square no larger but for ``room``, the largest at most 1.1 times."""
    expected = x.double() @ weight.T
    decoded = (x.double() @ weight.float().to(x.dtype).double().T).to(x.dtype)
    errors, allowed = (y - expected).abs(), (decoded - expected).abs()
    assert errors.square().mean().sqrt() <= room * allowed.square().mean().sqrt()
    assert errors.max() <= 1.1 * allowed.max()
