"""The fused product against fp64 products of the exact weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qsharded.quant.codebooks import CODEBOOKS
from qsharded.quant.own_kernels import CompiledCuda, rounding_factor
from qsharded_kernels import cuda_linear, cuda_nf4
from tests.kernels import cases, packed_products

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_library", "needs_cuda_part", "poisoned_outputs")]

DTYPES = cuda_linear.DTYPES
# around the edges of every tile of rows of x
ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300]
# one output, fewer than a batch's rows, no multiple of any tile; odd numbers of blocks; chunks that end early; a tile
# that many thread blocks share, and several tiles for each; rows that a thread block takes several passes for; on an
# H200 each height of a tile
WEIGHTS = [(1, 1), (7, 45), (33, 5), (1000, 9), (520, 45), (300, 64), (4100, 16), (8200, 64), (14300, 20), (300, 230)]
# with absmax rows that tensor maps take: fewer rows than a box, fewer columns than a chunk, chunks and boxes of absmax
# that end early, several tiles for each thread block, and the sizes that take tiles of 128 rows
BOXED_WEIGHTS = [(1, 1), (7, 16), (33, 5), (1000, 9), (520, 45), (4100, 16), (300, 230), (8200, 64)]
BOXED_WEIGHTS += [(14300, 20), (17000, 128)]
# the output's own rounding, relative to it; that of weights, whose errors are as good as random: ten times what a sum
# of them comes to, relative to |x||w| / sqrt(K), where each weight is off by a quarter of an ulp
OUTPUT_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
WEIGHT_ROUNDING = {dtype: 10 * rounding / 2 for dtype, rounding in OUTPUT_ROUNDING.items()}
SUM_ERROR = 2**-20  # of fp32 sums, relative to |x||w|


def on_gpu(encoded: cases.Encoded) -> list[Tensor | None]:
    """With their strides, which ``to`` alone would drop."""

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)

    return [tensor if tensor is None else move(tensor) for tensor in encoded.arguments()]


def boxed(N: int, G: int) -> cases.Encoded:
    """With absmax rows of a multiple of 16 bytes, and more: what the copy engine asks for; else they come by loads."""
    return cases.double_quantized(N, G, gap=16 + -G % 16)


def random_rows(M: int, K: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to("cuda", dtype)


def linear(x: Tensor, arguments: list[Tensor | None], bias: Tensor | None = None, quant_type: str = "nf4") -> Tensor:
    return cuda_linear.linear(x, *arguments, bias, factor=rounding_factor(quant_type, x.dtype))


def exact(encoded: cases.Encoded) -> Tensor:
    """The weight in fp32, on the GPU."""
    return encoded.expected(torch.float32).cuda()


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of the output, of weights and of sums. ``weight``: in fp32, on the GPU."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + (0 if bias is None else bias.double().abs())
    allowed = SUM_ERROR + WEIGHT_ROUNDING[y.dtype] / x.shape[1] ** 0.5
    excess = (y.double() - expected).abs() - expected.abs() * OUTPUT_ROUNDING[y.dtype] - sizes * allowed
    assert bool((excess <= 0).all()), f"{(~(excess <= 0)).sum()} of {y.numel()} are off, by up to {excess.max()}"


def assert_within_an_ulp(y: Tensor, expected: Tensor) -> None:
    """Of y's type; zeros are zeros."""
    ulp = torch.finfo(y.dtype).eps * 2.0 ** expected.double().abs().log2().floor()
    assert ((y.double() - expected.double()).abs() <= ulp).all()
    assert (y[expected == 0] == 0).all()


def assert_product_of(encoded: cases.Encoded, M: int) -> None:
    """Of M random rows."""
    x = random_rows(M, encoded.codes.shape[1] * 2, torch.bfloat16)
    y = linear(x, on_gpu(encoded))
    assert_product(y, x, exact(encoded))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize(("N", "G"), WEIGHTS)
def test_product(N: int, G: int, M: int) -> None:
    assert_product_of(cases.double_quantized(N, G), M)


@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 128, 129, 256])
@pytest.mark.parametrize(("N", "G"), BOXED_WEIGHTS)
def test_product_of_weights_whose_absmax_fit_boxes(N: int, G: int, M: int) -> None:
    assert_product_of(boxed(N, G), M)


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_returns_the_weight(dtype: torch.dtype, M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(300, 9)
    identity = torch.eye(576, dtype=dtype, device="cuda")
    columns = [linear(rows, on_gpu(encoded)).T for rows in identity.split(M)]
    assert_within_an_ulp(torch.cat(columns, dim=1), exact(encoded))


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64, 128, 256])
def test_every_pair_of_bytes(M: int, dtype: torch.dtype, quant_type: str, contiguous: bool) -> None:
    """Under fp32 absmax in strided rows or contiguous ones, of magnitudes that the dtype holds."""
    encoded = cases.every_pair_of_bytes(quant_type)
    arguments = on_gpu(encoded)
    arguments[1].clamp_(2.0**-10, 2.0**10)
    if contiguous:
        arguments[1] = arguments[1].contiguous()
    weight = cuda_nf4.dequantize(*arguments, torch.float32)
    identity = torch.eye(512, dtype=dtype, device="cuda")
    columns = [linear(rows, arguments, quant_type=quant_type).T for rows in identity.split(M)]
    assert_within_an_ulp(torch.cat(columns, dim=1), weight)


@pytest.mark.parametrize("quant_type", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("kind", packed_products.KINDS)
def test_its_error_is_no_larger_than_that_of_decoding_first(
    kind: str, M: int, dtype: torch.dtype, quant_type: str
) -> None:
    weight = packed_products.packed(4096, 2048, quant_type)
    x = packed_products.activations(kind, M, packed_products.exact(weight), dtype)
    y = CompiledCuda().linear(x, weight, None)
    packed_products.assert_errs_no_more(y, x, packed_products.exact(weight), room=1.01)  # sums in another order


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 3, 16, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype: torch.dtype, M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(1000, 9)
    x, bias = random_rows(M, 576, dtype), torch.randn(1000).to("cuda", dtype)
    y = linear(x, on_gpu(encoded), bias)
    assert_product(y, x, exact(encoded), bias)


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 5, 16, 32, 33, 100, 256])
def test_same_bits_in_every_run(M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(4100, 64)
    x, arguments = random_rows(M, 4096, torch.bfloat16), on_gpu(encoded)
    first = linear(x, arguments)
    for _ in range(20):
        cases.assert_same_bits(linear(x, arguments), first)


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 5, 16, 64, 256])
def test_graph_replays(M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(4100, 64)
    x, arguments = random_rows(M, 4096, torch.bfloat16), on_gpu(encoded)
    expected = linear(x, arguments)
    torch.use_deterministic_algorithms(False)  # its fills are no part of what is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, arguments)
    y.fill_(float("nan"))
    graph.replay()
    cases.assert_same_bits(y, expected)


@pytest.mark.parametrize(
    ("M", "kernel"), [(1, "vector"), (8, "stream"), (40, "stream"), (100, "wgmma"), (200, "wgmma")]
)
def test_kernels_on_hopper(M: int, kernel: str) -> None:
    """Those for every card would give the same sums, and nobody would notice."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a card of compute capability 9.0")
    encoded = cases.double_quantized(8200, 64)
    x, arguments = random_rows(M, 4096, torch.bfloat16), on_gpu(encoded)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        linear(x, arguments)
    assert any(f"linear_{kernel}" in event.key for event in profile.key_averages())


def test_views() -> None:
    """x transposed, x at an odd address, codes at an odd address."""
    encoded = cases.double_quantized(64, 9)
    arguments, weight = on_gpu(encoded), exact(encoded)
    transposed = random_rows(576, 5, torch.bfloat16).T
    assert_product(linear(transposed, arguments), transposed, weight)
    shifted = random_rows(2, 577, torch.bfloat16)[:1, 1:].expand(2, 576)
    assert_product(linear(shifted, arguments), shifted, weight)
    storage = torch.empty(arguments[0].numel() + 1, dtype=torch.uint8, device="cuda")
    codes = storage[1:].view_as(arguments[0]).copy_(arguments[0])
    assert_product(linear(shifted, [codes, *arguments[1:]]), shifted, weight)


@pytest.mark.parametrize(("M", "N"), [(0, 64), (5, 0)])
def test_nothing_to_do(M: int, N: int) -> None:
    encoded = cases.double_quantized(N, 9)
    assert linear(random_rows(M, 576, torch.bfloat16), on_gpu(encoded)).shape == (M, N)


@pytest.mark.parametrize("M", [1, 5, 100])
def test_beyond_32_bits(M: int) -> None:
    """Codes of 4 GiB and more: 2^33 weights and 64 rows over."""
    N, G = 2**17 + 64, 1024
    codes = torch.randint(256, (N, G * 32), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(256, (N, G), dtype=torch.uint8, device="cuda")
    scales = torch.rand(N * G // 256, device="cuda")
    encoded = cases.double_quantized(1, 1)
    _, _, _, offset, codebook, absmax_map = [t if t is None else t.cuda() for t in encoded.arguments()]
    x = random_rows(M, G * 64, torch.bfloat16)
    y = linear(x, [codes, absmax, scales, offset, codebook, absmax_map])
    for rows in (slice(0, 64), slice(N - 64, N)):
        block = slice(rows.start * G // 256, rows.stop * G // 256)
        packed = codes[rows], absmax[rows], scales[block], offset, codebook, absmax_map
        weight = cuda_nf4.dequantize(*packed, torch.float32)
        assert_product(y[:, rows], x, weight)
