"""The fused product against the reference: bit for bit where the activations allow it, else against fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qsharded.quant.codebooks import CODEBOOKS
from qsharded_kernels import cuda_linear, cuda_nf4
from tests.kernels import cases

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
# the output's own rounding, 2^-8 or 2^-11 of it, and fp32 sums of at most 4,096 products: relative to |x||w|
OUTPUT_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM_ERROR = 2**-20


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


def weight_of(encoded: cases.Encoded, M: int, dtype: torch.dtype) -> Tensor:
    """The weight that a product of M rows of ``dtype`` is one of: a single row's is not rounded."""
    unrounded = M == 1 and encoded.codes.shape[0] >= 8
    return encoded.expected(torch.float32 if unrounded else dtype).cuda()


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of the output and of the sums. ``weight`` is dequantized, on the GPU."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + (0 if bias is None else bias.double().abs())
    excess = (y.double() - expected).abs() - expected.abs() * OUTPUT_ROUNDING[y.dtype] - sizes * SUM_ERROR
    assert bool((excess <= 0).all()), f"{(~(excess <= 0)).sum()} of {y.numel()} are off, by up to {excess.max()}"


def assert_product_of(encoded: cases.Encoded, M: int) -> None:
    """Of M random rows."""
    x = random_rows(M, encoded.codes.shape[1] * 2, torch.bfloat16)
    y = cuda_linear.linear(x, *on_gpu(encoded))
    assert_product(y, x, weight_of(encoded, M, torch.bfloat16))


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
    weight = encoded.expected(dtype)
    identity = torch.eye(576, dtype=dtype, device="cuda")
    columns = [cuda_linear.linear(rows, *on_gpu(encoded)).T for rows in identity.split(M)]
    assert torch.equal(torch.cat(columns, dim=1).cpu(), weight)  # by value: a sum that starts at 0 has no -0


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
    weight = cuda_nf4.dequantize(*arguments, dtype)
    identity = torch.eye(512, dtype=dtype, device="cuda")
    columns = [cuda_linear.linear(rows, *arguments).T for rows in identity.split(M)]
    assert torch.equal(torch.cat(columns, dim=1), weight)


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 3, 16, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype: torch.dtype, M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(1000, 9)
    x, bias = random_rows(M, 576, dtype), torch.randn(1000).to("cuda", dtype)
    y = cuda_linear.linear(x, *on_gpu(encoded), bias)
    assert_product(y, x, weight_of(encoded, M, dtype), bias)


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 5, 16, 32, 33, 100, 256])
def test_same_bits_in_every_run(M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(4100, 64)
    x, arguments = random_rows(M, 4096, torch.bfloat16), on_gpu(encoded)
    first = cuda_linear.linear(x, *arguments)
    for _ in range(20):
        cases.assert_same_bits(cuda_linear.linear(x, *arguments), first)


@pytest.mark.parametrize("make", [cases.double_quantized, boxed])
@pytest.mark.parametrize("M", [1, 5, 16, 64, 256])
def test_graph_replays(M: int, make: Callable[[int, int], cases.Encoded]) -> None:
    encoded = make(4100, 64)
    x, arguments = random_rows(M, 4096, torch.bfloat16), on_gpu(encoded)
    expected = cuda_linear.linear(x, *arguments)
    torch.use_deterministic_algorithms(False)  # its fills are no part of what is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_linear.linear(x, *arguments)
    y.fill_(float("nan"))
    graph.replay()
    cases.assert_same_bits(y, expected)


@pytest.mark.parametrize(("M", "kernel"), [(1, "vector"), (8, "stream"), (40, "wgmma"), (100, "wgmma"), (200, "wgmma")])
def test_kernels_on_hopper(M: int, kernel: str) -> None:
    """Those for every card would give the same sums, and nobody would notice."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a card of compute capability 9.0")
    encoded = cases.double_quantized(8200, 64)
    x, arguments = random_rows(M, 4096, torch.bfloat16), on_gpu(encoded)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        cuda_linear.linear(x, *arguments)
    assert any(f"linear_{kernel}" in event.key for event in profile.key_averages())


def test_views() -> None:
    """x transposed, x at an odd address, codes at an odd address."""
    encoded = cases.double_quantized(64, 9)
    arguments, weight = on_gpu(encoded), encoded.expected(torch.bfloat16).cuda()
    transposed = random_rows(576, 5, torch.bfloat16).T
    assert_product(cuda_linear.linear(transposed, *arguments), transposed, weight)
    shifted = random_rows(2, 577, torch.bfloat16)[:1, 1:].expand(2, 576)
    assert_product(cuda_linear.linear(shifted, *arguments), shifted, weight)
    storage = torch.empty(arguments[0].numel() + 1, dtype=torch.uint8, device="cuda")
    codes = storage[1:].view_as(arguments[0]).copy_(arguments[0])
    assert_product(cuda_linear.linear(shifted, codes, *arguments[1:]), shifted, weight)


@pytest.mark.parametrize(("M", "N"), [(0, 64), (5, 0)])
def test_nothing_to_do(M: int, N: int) -> None:
    encoded = cases.double_quantized(N, 9)
    assert cuda_linear.linear(random_rows(M, 576, torch.bfloat16), *on_gpu(encoded)).shape == (M, N)


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
    y = cuda_linear.linear(x, codes, absmax, scales, offset, codebook, absmax_map)
    for rows in (slice(0, 64), slice(N - 64, N)):
        block = slice(rows.start * G // 256, rows.stop * G // 256)
        weight_dtype = torch.float32 if M == 1 else torch.bfloat16  # as in weight_of
        weight = cuda_nf4.dequantize(
            codes[rows], absmax[rows], scales[block], offset, codebook, absmax_map, weight_dtype
        )
        assert_product(y[:, rows], x, weight)
