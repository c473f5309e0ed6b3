"""The fused product in Triton, interpreted where there is no GPU, against the fp64 product of the exact weights."""

from itertools import product

import pytest
import torch

from qsharded.quant import own_kernels
from qsharded_kernels import cuda, triton_tiles
from qsharded_kernels.triton_decode import DECODERS
from qsharded_kernels.triton_linear import MOST_ROWS
from qsharded_kernels.triton_tiles import LinearTile
from tests.kernels.cases import assert_same_bits
from tests.kernels.packed_products import DEVICE, KINDS, activations, assert_errs_no_more, exact, packed, random

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

N, K = 72, 320  # a tile of rows of W and part of another; five blocks, one more than a turn of the loop takes
QUICK = LinearTile(32, 2, decoder="gather")  # numpy takes ten times as long to permute bytes
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


@dtypes
@types
@pytest.mark.parametrize("kind", KINDS)
def test_its_error_is_no_larger_than_that_of_decoding_first(kind: str, quant_type: str, dtype: torch.dtype) -> None:
    weight = packed(256, K, quant_type)
    x = activations(kind, 16, exact(weight), dtype)
    y = own_kernels.triton_linear(x, weight, None, tile=LinearTile(128, 8, decoder="gather"))
    assert_errs_no_more(y, x, exact(weight))


@dtypes
@types
def test_single_weights_are_within_an_ulp_and_zeros_stay_zeros(quant_type: str, dtype: torch.dtype) -> None:
    weight = packed(N, K, quant_type)
    identity = torch.eye(K, device=DEVICE, dtype=dtype)
    tile = LinearTile(128, 8, decoder="gather")
    rows = [own_kernels.triton_linear(x, weight, None, tile=tile) for x in identity.split(MOST_ROWS)]
    y, expected = torch.cat(rows).double(), exact(weight).T
    ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** expected.abs().log2().floor()
    assert ((y - expected).abs() <= ulp).all()
    assert (y[expected == 0] == 0).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("M", [3, 33])
@pytest.mark.parametrize("splits", [1, 2, 9])
def test_parts_of_k_and_bias_make_the_sum(splits: int, M: int, double_quant: bool) -> None:
    """x in strided rows; splits that leave the last part short, too, and more of them than there are turns."""
    weight, bias = packed(N, K, double_quant=double_quant), random(N).half()
    x = random(K, M).half().T
    y = own_kernels.triton_linear(x, weight, bias, tile=QUICK, splits=splits)
    assert (y.dtype, y.shape) == (torch.float16, (M, N))
    expected = x.double() @ exact(weight).T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=2e-3 * K**0.5)
    assert_same_bits(y, own_kernels.triton_linear(x, weight, bias, tile=QUICK, splits=splits))


# fewer rows than a tile, one block, whole turns, second-level scales that change within a row
@pytest.mark.parametrize(("N", "K"), [(1, 64), (33, 256), (70, 45 * 64)])
def test_edges_of_tiles(N: int, K: int) -> None:
    weight = packed(N, K)
    x = random(1, K).bfloat16()
    y = own_kernels.triton_linear(x, weight, None, tile=QUICK)
    torch.testing.assert_close(y.double(), x.double() @ exact(weight).T, rtol=2**-7, atol=4e-3 * K**0.5)


# of tensor cores' layouts: mma with 8 and 16 rows of x, wgmma; several turns of a warp over the tile
TILES = [LinearTile(32, 2), LinearTile(64, 4, stages=1), LinearTile(64, 2, stages=3), LinearTile(128, 4)]


@dtypes
@pytest.mark.parametrize("M", [2, 9])
def test_every_decoder_and_tile_gives_the_same_bits(M: int, dtype: torch.dtype) -> None:
    """All 256 bytes are there. fp32 sums follow another order in ``wgmma``; here they are exact: powers of two."""
    weight = packed(16, 512)
    weight.codes.copy_(torch.arange(16 * 256, device=DEVICE).view(16, 256) % 256)
    x = torch.zeros(M, 512, device=DEVICE, dtype=dtype)
    x[:, 3::64] = 0.5
    x[1:, 6::64] = 2
    tiles = TILES if DEVICE == "cuda" else TILES[:1]
    ways = [
        LinearTile(tile.rows, tile.warps, tile.stages, decoder=decoder) for tile, decoder in product(tiles, DECODERS)
    ]
    results = [own_kernels.triton_linear(x, weight, None, tile=way) for way in ways]
    for result in results[1:]:
        assert_same_bits(result, results[0])
    torch.testing.assert_close(results[0].double(), x.double() @ exact(weight).T, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("asked", [None, "compiled", "triton"])
def test_it_serves_where_the_compiled_library_does_not_or_where_it_is_asked_for(
    asked: str | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QSHARDED_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("QSHARDED_BACKEND", asked)
    monkeypatch.setattr(cuda, "is_available", lambda device: compiled)
    monkeypatch.setattr(triton_tiles, "most_rows", lambda N, K, device: 16 if N == 72 else 0)
    kernels = own_kernels.triton_for_cuda(torch.device("cuda"))
    assert kernels is not None
    for multiplies in (kernels.multiplies, kernels.multiplies_grad):
        assert multiplies(packed(N, K), 16, torch.bfloat16) == (asked == "triton" or not compiled)
        assert not multiplies(packed(N, K), 17, torch.bfloat16)
        assert not multiplies(packed(N, K), 16, torch.float32)
        assert not multiplies(packed(71, K), 16, torch.bfloat16)
